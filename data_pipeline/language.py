"""The language of a document, by py3langid (naive Bayes over byte n-grams, no network, one process)."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["VERSION", "identify", "language_version", "languages"]

# Part of the content address: raise it when `identify` changes what it returns.
VERSION = 2
# Characters looked at: as sure as a whole page, and a long document costs no more than a short one.
EXCERPT = 1000
# White space is collapsed in this much of the text: to the model, a page of empty lines is a language.
PREFIX = 8 * EXCERPT


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> frozenset[str]:
    """The codes `identify` can return: ISO 639-1 where there is one, else 639-3; "zxx" is no language."""
    return frozenset(_identifier().labels)


def identify(text: str) -> tuple[str, float]:
    """Most probable language of the first 1,000 characters and its probability, rounded to 1e-3.

    Any run of white space counts as one character, and none at the beginning.

    Rounded because the last bits of the scores depend on the machine's matrix product. A title page or a
    table of contents gives a low probability: judge documents, not their first lines, by language.
    """
    excerpt = " ".join(text.lstrip()[:PREFIX].split())[:EXCERPT]
    code, probability = _identifier().classify(excerpt)
    return code, round(probability, 3)


def language_version() -> str:
    """This module's and the model's version, for the content address of what `identify` decided."""
    from importlib.metadata import version

    return f"{VERSION} py3langid {version('py3langid')}"
