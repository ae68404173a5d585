"""Which documents are held out: whole ones, by the hash of their text, so that equal texts stay together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SPLITS", "Holdout", "choose_holdout"]

SPLITS = ("train", "validation", "test")
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


def choose_holdout(hashes: np.ndarray, *, validation: float, test: float) -> Holdout:
    """Thresholds that hold out about these shares of the documents.

    Where the shares give no document, as in a small corpus, one is held out for each share above 0, and one
    is left to train on. Else the thresholds follow from the shares alone.

    Args:
        hashes: uint64 [n], of all documents kept.
        validation, test: shares, each below 0.5.

    Raises:
        ValueError: the corpus is too small for that.
    """
    found = np.unique(hashes)
    needed = 2 + (test > 0)
    if len(found) < needed:
        raise ValueError(
            f"data.source: the corpus has {len(found)} different document(s), but whole documents are held "
            f"out and it needs {needed}: add documents, or cut a long .txt file with "
            "data.source.text_document_bytes = 65536"
        )
    first = int(validation * ALL)
    second = first + int(test * ALL)
    lowest, highest = int(found[0]), int(found[-1])
    if test == 0:
        first = min(max(first, lowest + 1), highest)
        return Holdout(first, first)
    first = min(max(first, lowest + 1), int(found[-2]))
    after = int(found[np.searchsorted(found, np.uint64(first))])
    return Holdout(first, min(max(second, after + 1), highest))
