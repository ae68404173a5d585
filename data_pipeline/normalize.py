"""Text normalisation: the only changes made to a document before it is filtered, hashed and tokenised."""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

from data_pipeline.config import NormalizeConfig

__all__ = ["VERSION", "normalize"]

# Part of every work unit's content address: raise it when `normalize` changes what it returns.
VERSION = 2

# What ftfy.fixes.remove_control_chars removes: C0 but tab, newline, form feed and carriage return; DEL; the
# deprecated Arabic controls; interlinear annotation and the object replacement character; the byte order
# mark. Joiners, direction marks, tags and C1 controls stay. The search is ten times as fast as ftfy's table.
CONTROL = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufff9-\ufffc\ufeff]")
# Characters that are or decompose to combining marks; beyond the BMP more than those, for one range is tested
# faster than sixty (emoji lie above it).
BMP = [chr(code) for code in range(0x300, 0x10000)]
MARKS = "".join(c for c in BMP if unicodedata.combining(unicodedata.normalize("NFKD", c)[0]))
MARK = f"[{MARKS}\U00010000-\U0001efff]"
# unicodedata sorts a run of n marks by insertion, in n**2 steps; no language needs more than 30 (UAX #15). It
# is faster to look at every STEP-th character first: RUN // STEP of RUN in a row are among them.
RUN, STEP = 31, 5
MAY_HOLD_RUN = re.compile(f"{MARK}{{{RUN // STEP}}}")
LONG_RUN = re.compile(f"{MARK}{{{RUN},}}")
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
    if form == "none":
        return text
    if not text.isascii() and MAY_HOLD_RUN.search(text[::STEP]):
        decomposed = form.replace("C", "D")
        text = LONG_RUN.sub(lambda found: _ordered(found[0], decomposed), text)
    return unicodedata.normalize(form, text)  # type: ignore[arg-type]


def _ordered(run: str, form: str) -> str:
    """`run` in `form` (NFD or NFKD), its marks in canonical order, in n log n steps: an equivalent text."""
    characters = "".join(unicodedata.normalize(form, c) for c in run)  # type: ignore[arg-type]
    parts: list[str] = []
    for _, marks_or_others in groupby(characters, key=lambda c: unicodedata.combining(c) > 0):
        parts += sorted(marks_or_others, key=unicodedata.combining)
    return "".join(parts)


def _repaired(text: str) -> str:
    """Each line by itself, as in ftfy.fix_text: other letters elsewhere do not keep a line from repair."""
    if text.isascii():
        return text
    from ftfy import fix_encoding

    return "\n".join(line if line.isascii() else fix_encoding(line) for line in text.split("\n"))
