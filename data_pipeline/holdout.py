"""Which documents are held out: whole ones, by the hash of their text, so that equal texts stay together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SPLITS", "Holdout", "choose_holdout"]

SPLITS = ("train", "validation", "test")
# A corpus of up to this many bytes gets a held-out document even if the fraction would give none. Beyond it
# there are hashes enough.
SMALL = 64 * 2**20
ALL = 1 << 64


@dataclass(frozen=True)
class Holdout:
    """Thresholds on the 64-bit document hash.

    Attributes:
        validation: a document whose hash is below this is in the validation split.
        test: one that is not, and whose hash is below this, is in the test split.
    """

    validation: int
    test: int

    def address(self) -> list[str]:
        """Both, for a content address; JSON numbers end at 2**53."""
        return [str(self.validation), str(self.test)]

    def splits(self, hashes: np.ndarray) -> np.ndarray:
        """Index in SPLITS of each document; `hashes` uint64 [n]."""
        found = np.zeros(len(hashes), np.int64)
        found[hashes < np.uint64(min(self.test, ALL - 1))] = SPLITS.index("test")
        found[hashes < np.uint64(min(self.validation, ALL - 1))] = SPLITS.index("validation")
        return found


def choose_holdout(hashes: np.ndarray, size: int, *, validation: float, test: float) -> Holdout:
    """Thresholds that hold out about these shares of the documents.

    In a small corpus at least one document is held out for each share above 0, and one is left to train on.

    Args:
        hashes: uint64 [n], of all documents kept.
        size: their bytes.
        validation, test: shares.

    Raises:
        ValueError: the corpus is too small for that.
    """
    first = int(validation * ALL)
    second = first + int(test * ALL)
    if size > SMALL:
        return Holdout(first, second)
    found = [int(value) for value in np.unique(hashes)]
    needed = 2 + (test > 0)
    if len(found) < needed:
        raise ValueError(
            f"data.source: the corpus has {len(found)} different document(s), but whole documents are held "
            f"out and it needs {needed}: add documents, or cut a long .txt file with "
            "data.source.text_document_bytes = 65536"
        )
    if test == 0:
        first = min(max(first, found[0] + 1), found[-1])
        return Holdout(first, first)
    first = min(max(first, found[0] + 1), found[-2])
    after = next(value for value in found if value >= first)
    return Holdout(first, min(max(second, after + 1), found[-1]))
