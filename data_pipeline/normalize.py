"""Text normalisation: the only changes made to a document before it is filtered, hashed and tokenised."""

from __future__ import annotations

import re
import unicodedata

from data_pipeline.config import NormalizeConfig

__all__ = ["VERSION", "normalize"]

# Part of every work unit's content address: raise it when `normalize` changes what it returns.
VERSION = 2

# What ftfy.fixes.remove_control_chars removes: C0 but tab, newline, form feed and carriage return; DEL; the
# deprecated Arabic controls; interlinear annotation and the object replacement character; the byte order
# mark. Joiners, direction marks, tags and C1 controls stay. The search is ten times as fast as ftfy's table.
CONTROL = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufff9-\ufffc\ufeff]")
# Repaired text may show mojibake that control characters or open accents hid. Real text settles in two.
PASSES = 8
DEFAULT = NormalizeConfig()


def normalize(text: str, config: NormalizeConfig = DEFAULT) -> str:
    r"""`text` in one form: mojibake undone, line endings, control characters, Unicode; idempotent.

    Args:
        text: a document.
        config: whether ftfy undoes wrong decodings, line by line (ftfy.fix_encoding: HTML entities, quotes
            and widths are left alone), and the Unicode normal form.

    Returns:
        The text with CRLF, CR, NEL (U+0085) and U+2028/2029 as "\n", without the characters of CONTROL.

    Raises:
        ValueError: a lone surrogate, which no UTF-8 file can hold (UnicodeEncodeError is a ValueError).
    """
    text.encode()
    for _ in range(PASSES if config.mojibake else 1):
        before = text
        text = _simplified(_repaired(text) if config.mojibake else text, config.form)
        if text == before:
            break
    return text


def _simplified(text: str, form: str) -> str:
    for mark in ("\r\n", "\r", "\u2028", "\u2029", "\u0085"):
        text = text.replace(mark, "\n")
    text = CONTROL.sub("", text)
    return text if form == "none" else unicodedata.normalize(form, text)  # type: ignore[arg-type]


def _repaired(text: str) -> str:
    """Each line by itself, as in ftfy.fix_text: other letters elsewhere do not keep a line from repair."""
    if text.isascii():
        return text
    from ftfy import fix_encoding

    return "\n".join(line if line.isascii() else fix_encoding(line) for line in text.split("\n"))
