"""MinHash signatures: the share of equal values estimates the Jaccard similarity of two documents' shingles.

Broder 1997, "On the resemblance and containment of documents"; bands after Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", chapter 3.4. The values are those of rensa's RMinHash.

    n   documents     permutations   values per document     bands   groups of permutations / bands values
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.config import DedupConfig
from data_pipeline.words import windows

__all__ = ["VERSION", "band_keys", "signature_version", "signatures", "similarity"]

# Part of the content address, in `signature_version`: raise it when a signature or a key changes.
VERSION = 1
SEED = 1
# Constants of splitmix64 (Steele, Lea, Flood 2014).
GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def signatures(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash values of each text, uint32 [n, permutations]; the same on every machine.

    A shingle is ``config.shingle_words`` consecutive words, lower case, what lies between white space; a text
    with fewer words is one shingle.
    """
    from rensa import RMinHash

    values = np.empty((len(texts), config.permutations), np.uint32)
    for row, text in zip(values, texts):
        sketch = RMinHash(num_perm=config.permutations, seed=SEED)
        _update(sketch, text, config.shingle_words)
        row[:] = sketch.digest()
    return values


def _update(sketch: Any, text: str, size: int) -> None:
    words: list[str] = []
    short = True
    for window in windows(text):
        words += window.lower().split()
        if len(words) >= size:
            short = False
            sketch.update(list(map(" ".join, zip(*(words[start:] for start in range(size))))))
            del words[: len(words) - size + 1]  # the next window's first shingles begin with the rest
    if short:
        sketch.update([" ".join(words)])


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """One 64-bit key per band: equal values in a band give equal keys, others differ but for one in 2**64.

    Args:
        signatures: uint32 [n, permutations].
        bands: groups; a divisor of permutations. Band 0's keys never serve band 1: the number is mixed in.

    Returns:
        uint64 [n, bands].
    """
    values = signatures.reshape(len(signatures), bands, signatures.shape[1] // bands)
    keys = np.broadcast_to(_mix(np.arange(1, bands + 1, dtype=np.uint64)), values.shape[:2])
    for place in range(values.shape[2]):
        keys = _mix(keys ^ values[:, :, place])
    return np.ascontiguousarray(keys)


def _mix(state: np.ndarray) -> np.ndarray:
    """A step of splitmix64, a bijection of 64 bits: uint64 to uint64, any shape; wraps around."""
    state = state + GOLDEN
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity: share of equal values. uint32 [..., permutations] to float64 [...]."""
    return np.asarray((a == b).mean(axis=-1))


def signature_version() -> str:
    """What decides the values beside the config: this module, rensa and its algorithm."""
    from importlib.metadata import version

    from rensa import RMinHash

    return f"{VERSION} rensa {version('rensa')} algorithm {RMinHash.ALGORITHM_VERSION}"
