"""What a word is, and long texts in windows, which keep a filter's memory near the text's own size."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["WORD", "windows"]

# Letters, digits and underscores of any script: punctuation parts words and belongs to none. Decontamination
# has a word of its own, which underscores part too.
WORD = re.compile(r"\w+")
WINDOW = 2**18
SPACE = re.compile(r"\s")


def windows(text: str) -> Iterator[str]:
    """Consecutive parts of about WINDOW characters that begin with white space, so that no word is cut.

    What has no white space for longer than that stays in one part.
    """
    start = 0
    while len(text) - start > WINDOW and (found := SPACE.search(text, start + WINDOW)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
