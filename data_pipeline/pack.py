"""Packing and order: which tokens make row i, and which row comes when; arithmetic only.

The split's documents, shard after shard, form one stream that is cut into rows of T + 1 tokens overlapping by
one, so that every token is the label of exactly one position. "concat" puts documents end to end; "aligned"
starts each at a multiple of the chunk size and fills the gap with EOS, whose labels are masked: then no
boundary of a segment falls inside a chunk. The order of an epoch is a keyed permutation computed row by row:
nothing is stored, and any rank on any mesh gets the same answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from data_pipeline.shard import Shard

__all__ = ["EpochOrder", "Stream", "mask_of", "num_rows"]

IGNORED = -100
ROUNDS = 6


def num_rows(tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` labels that hold every token of a stream but the first."""
    return -(-max(0, tokens - 1) // sequence_length)


def mask_of(tokens: np.ndarray, labels: np.ndarray, eos_id: int) -> np.ndarray:
    """`labels` with -100 where the input is an EOS: what follows is another document.

    Args:
        tokens, labels: [..., T], the labels already shifted.
    """
    return np.where(tokens == eos_id, IGNORED, labels)


class Stream:
    """The documents of several shards as one sequence of tokens.

    Attributes:
        document_starts: int64 [documents + 1], position of each document's BOS, and the end of the stream.
    """

    def __init__(self, shards: list[Shard], *, align: int = 1, fill: int = 0) -> None:
        """Opened shards, in order; documents start at multiples of `align`, the gaps hold `fill`."""
        self.shards, self.fill = shards, fill
        self.offsets = np.cumsum([0] + [len(shard.tokens) for shard in shards])
        starts = [shard.starts[:-1] + offset for shard, offset in zip(shards, self.offsets)]
        self._stored = np.concatenate([*starts, self.offsets[-1:]])  # where documents lie in the shards
        padded = -(-np.diff(self._stored) // align) * align
        self.document_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(padded)])

    def __len__(self) -> int:
        return int(self.document_starts[-1])

    @property
    def stored_tokens(self) -> int:
        """Tokens of the shards; less than the length where documents are aligned."""
        return int(self.offsets[-1])

    def document(self, index: int) -> np.ndarray:
        """Stored tokens of a document as int64."""
        return self._read(*self._stored[index : index + 2])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64; the part beyond the stream's end is missing."""
        stop = min(stop, len(self))
        if len(self) == self.stored_tokens:
            return self._read(start, stop)
        tokens = np.full(max(0, stop - start), self.fill, np.int64)
        first = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, stop, side="left"))
        for index in range(max(first, 0), last):
            begin = int(self.document_starts[index])
            shift = int(self._stored[index]) - begin
            end = int(self._stored[index + 1]) - shift
            a, b = max(start, begin), min(stop, end)
            if a < b:
                tokens[a - start : b - start] = self._read(a + shift, b + shift)
        return tokens

    def starts_in(self, start: int, stop: int) -> np.ndarray:
        """Positions, relative to `start`, where documents begin in (start, stop), and 0."""
        first, last = np.searchsorted(self.document_starts, [start + 1, min(stop, len(self))])
        return np.concatenate([np.zeros(1, np.int64), self.document_starts[first:last] - start])

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        for shard, offset in zip(self.shards[first:], self.offsets[first:]):
            if offset >= stop:
                break
            parts.append(shard.tokens[max(0, start - offset) : stop - offset].astype(np.int64))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """A permutation of range(size), one per (fingerprint, seed, epoch), computed where it is asked for.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it falls inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Uniform enough to shuffle, and the
    same for every version of every library.
    """

    fingerprint: str
    seed: int
    size: int

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Row of each global sample number (int64, any shape); sample s is in epoch s // size."""
        rows = np.empty_like(samples)
        for epoch in np.unique(samples // self.size):
            chosen = samples // self.size == epoch
            rows[chosen] = self._permute(samples[chosen] % self.size, self._keys(int(epoch)))
        return rows

    def _keys(self, epoch: int) -> np.ndarray:
        secret = hashlib.sha512(f"{self.fingerprint}/{self.seed}/{epoch}".encode()).digest()
        return np.frombuffer(secret, "<u8")[:ROUNDS]

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = max(1, -(-(self.size - 1).bit_length() // 2))
        out = self._feistel(values.astype(np.uint64), keys, half)
        while (outside := out >= self.size).any():
            out[outside] = self._feistel(out[outside], keys, half)
        return out.astype(np.int64)

    @staticmethod
    def _feistel(values: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
        bits, low = np.uint64(half), np.uint64((1 << half) - 1)
        left, right = values >> bits, values & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        joined: np.ndarray = (left << bits) | right
        return joined


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
