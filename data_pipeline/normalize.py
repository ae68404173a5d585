"""Text normalisation: the only changes made to a document before it is hashed, split and tokenised."""

from __future__ import annotations

__all__ = ["VERSION", "normalize"]

# Part of every work unit's content address: raise it when `normalize` changes what it returns.
VERSION = 1


def normalize(text: str) -> str:
    """`text` with line endings as "\\n" and NUL characters removed; everything else is kept.

    Raises:
        ValueError: a lone surrogate, which no UTF-8 file can hold (UnicodeEncodeError is a ValueError).
    """
    text.encode()
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
