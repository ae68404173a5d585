"""Unigram and interpolated bigram: the baselines a language model has to beat.

A stored document is [BOS] pieces [EOS]; the targets are its pieces and EOS, each predicted from the token
before it. Both models are counted on the training documents and scored on the (token, label) pairs that the
language model was scored on, so the three numbers describe the same targets.

    unigram   P(w)     = (c(w) + 1) / (sum_w c(w) + V)
    bigram    P(w | v) = max(c(v, w) - d, 0) / c(v) + d N1+(v, .) / c(v) * L(w)

d = n1 / (n1 + 2 n2), n1 and n2 the number of bigrams seen once and twice (Ney, Essen and Kneser 1994). L is
either the unigram above or the Kneser-Ney continuation estimate (N1+(., w) + 1) / (N1+(., .) + V); the
stronger of the two on the scored text is the one reported, which can only raise the bar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Lower = Literal["unigram", "kneser_ney"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Tokens = NDArray[np.integer[Any]]

# Tokens counted at once: bounds the memory of the sort.
_PART_TOKENS = 4_000_000

__all__ = ["InterpolatedBigram", "NgramCounts", "Unigram", "count_ngrams"]


@dataclass(frozen=True)
class NgramCounts:
    """Counts over training targets.

    Attributes:
        vocab_size: V.
        unigram: [V] occurrences of w as a target.
        pair_keys: [P] sorted v * V + w of every bigram seen.
        pair_counts: [P] how often.
        tokens: training targets counted.
    """

    vocab_size: int
    unigram: Ints
    pair_keys: Ints
    pair_counts: Ints
    tokens: int

    def discount(self) -> float:
        """d = n1 / (n1 + 2 n2); 0.5 where a corpus is too small to estimate it (no bigram seen once)."""
        once = int(np.count_nonzero(self.pair_counts == 1))
        twice = int(np.count_nonzero(self.pair_counts == 2))
        # d = 1 (no bigram seen twice) would leave a context of singletons without any mass of its own.
        return min(once / (once + 2 * twice), 0.95) if once else 0.5


def count_ngrams(
    documents: Iterable[Tokens], vocab_size: int, *, max_tokens: int | None = None
) -> NgramCounts:
    """Count the targets of ``documents`` and the pairs (token before, target).

    Args:
        documents: token arrays [n], each BOS pieces EOS; pairs never cross from one to the next.
        vocab_size: V; a token outside [0, V) is a ``ValueError``.
        max_tokens: stop after the document that reaches this many tokens; None reads all.
    """
    unigram = np.zeros(vocab_size, np.int64)
    keys, counts, tokens = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    for before, target in _parts(documents, max_tokens):
        low, high = min(before.min(), target.min()), max(before.max(), target.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}: "
                "the shards and the tokenizer do not belong together; prepare the data again"
            )
        tokens += target.size
        unigram += np.bincount(target, minlength=vocab_size)
        part_keys, part_counts = np.unique(before * vocab_size + target, return_counts=True)
        keys, counts = _merge(keys, counts, part_keys, part_counts)
    return NgramCounts(vocab_size, unigram, keys, counts, tokens)


def _parts(documents: Iterable[Tokens], max_tokens: int | None) -> Iterator[tuple[Ints, Ints]]:
    """(token before, target) arrays of about ``_PART_TOKENS`` tokens."""
    held: list[Tokens] = []
    held_tokens, seen = 0, 0
    for document in documents:
        if document.size > 1:
            held.append(document)
            held_tokens += document.size
            seen += document.size
        if held_tokens >= _PART_TOKENS:
            yield _pairs(held)
            held, held_tokens = [], 0
        if max_tokens is not None and seen >= max_tokens:
            break
    if held:
        yield _pairs(held)


def _pairs(documents: list[Tokens]) -> tuple[Ints, Ints]:
    """Adjacent tokens inside each document."""
    stream = np.concatenate(documents).astype(np.int64)
    inside = np.ones(stream.size - 1, bool)
    inside[np.cumsum([document.size for document in documents])[:-1] - 1] = False
    return stream[:-1][inside], stream[1:][inside]


def _merge(keys: Ints, counts: Ints, more_keys: Ints, more_counts: Ints) -> tuple[Ints, Ints]:
    """Sum two sorted count tables."""
    if not keys.size:
        return more_keys, more_counts
    union, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    total = np.bincount(where, weights=np.concatenate([counts, more_counts]), minlength=union.size)
    return union, total.astype(np.int64)


class Unigram:
    """Add-one unigram over training targets."""

    def __init__(self, counts: NgramCounts) -> None:
        self._probability: Floats = (counts.unigram + 1) / (counts.tokens + counts.vocab_size)

    def distribution(self) -> Floats:
        """P(w) [V]."""
        return self._probability

    def log_prob(self, targets: Ints) -> Floats:
        """ln P(target), nats; same shape as ``targets``."""
        return np.log(self._probability[targets])


class InterpolatedBigram:
    """Absolute discounting interpolated with a lower-order distribution (module docstring)."""

    def __init__(self, counts: NgramCounts, *, lower: Lower = "kneser_ney") -> None:
        self.vocab_size = counts.vocab_size
        self.discount = counts.discount()
        self._keys, self._counts = counts.pair_keys, counts.pair_counts
        before, target = counts.pair_keys // self.vocab_size, counts.pair_keys % self.vocab_size
        total = np.bincount(before, weights=counts.pair_counts, minlength=self.vocab_size)
        types = np.bincount(before, minlength=self.vocab_size)
        # A context never seen keeps its whole mass for the lower order.
        self._total = np.where(total > 0, total, 1.0)
        self._left = np.where(total > 0, self.discount * types / self._total, 1.0)
        self._lower = Unigram(counts).distribution()
        if lower == "kneser_ney":
            continuation = np.bincount(target, minlength=self.vocab_size)
            self._lower = (continuation + 1) / (continuation.sum() + self.vocab_size)

    def log_prob(self, before: Ints, targets: Ints) -> Floats:
        """ln P(target | token before), nats; both arguments and the result have one shape."""
        keys = before.astype(np.int64) * self.vocab_size + targets
        place = np.minimum(np.searchsorted(self._keys, keys), max(self._keys.size - 1, 0))
        seen = self._keys[place] == keys if self._keys.size else np.zeros(keys.shape, bool)
        own = np.where(seen, (self._counts[place] if self._keys.size else 0) - self.discount, 0.0)
        return np.log(own / self._total[before] + self._left[before] * self._lower[targets])

    def distribution(self, before: int) -> Floats:
        """P(. | before) [V]."""
        every = np.arange(self.vocab_size, dtype=np.int64)
        return np.exp(self.log_prob(np.full(self.vocab_size, before, np.int64), every))
