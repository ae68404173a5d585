"""Sums of losses, of a model and of n-grams on the same targets, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.ngram import InterpolatedBigram, Lower, Unigram

Array = NDArray[Any]

__all__ = ["ContextLosses", "NGrams", "Sums", "Targets"]

FIRST_BUCKET = 16


@dataclass
class ContextLosses:
    """Sums of losses by the tokens of context before the target: 0-15, 16-31, 32-63, ...

    Attributes:
        loss, tokens: nats and targets per bucket, fp64.
    """

    loss: Array
    tokens: Array

    @classmethod
    def up_to(cls, length: int) -> ContextLosses:
        """Nothing yet; room for targets after fewer than ``length`` tokens."""
        size = int(_bucket(np.array([length]))[0]) + 1
        return cls(np.zeros(size), np.zeros(size))

    def add(self, losses: Array, positions: Array) -> None:
        """Losses [n] of targets after ``positions`` [n] tokens of context."""
        buckets, size = _bucket(positions), len(self.loss)
        self.loss += np.bincount(buckets, weights=losses.astype(np.float64), minlength=size)
        self.tokens += np.bincount(buckets, minlength=size)

    def merge(self, other: ContextLosses) -> None:
        """Add the sums of other targets."""
        self.loss += other.loss
        self.tokens += other.tokens

    def rows(self) -> list[dict[str, float]]:
        """Mean loss of each bucket that holds targets: "from", "to" (exclusive), "tokens", "loss"."""
        edges = [0] + [FIRST_BUCKET * 2**i for i in range(len(self.loss))]
        return [
            {"from": edges[i], "to": edges[i + 1], "tokens": int(tokens), "loss": float(loss / tokens)}
            for i, (loss, tokens) in enumerate(zip(self.loss, self.tokens))
            if tokens
        ]


def _bucket(positions: Array) -> Array:
    return np.where(
        positions < FIRST_BUCKET, 0, np.log2(np.maximum(positions, 1) / FIRST_BUCKET).astype(int) + 1
    )


@dataclass(frozen=True)
class Targets:
    """Scored tokens [n], the token before each, and how many more stand before that in its row."""

    before: Array
    target: Array
    position: Array


@dataclass(frozen=True)
class NGrams:
    """The n-grams that were counted on a training split."""

    unigram: Unigram
    bigrams: Mapping[Lower, InterpolatedBigram]

    def nats(self, targets: Targets) -> dict[str, float]:
        """Of each n-gram on the targets."""
        nats = {"unigram": -float(self.unigram.log_prob(targets.target).sum())}
        for lower, bigram in self.bigrams.items():
            nats[f"bigram/{lower}"] = -float(bigram.log_prob(targets.before, targets.target).sum())
        return nats


@dataclass
class Sums:
    """Sums over scored targets: nats of the model and of each n-gram, and the model's by context."""

    nats: dict[str, float]
    by_context: ContextLosses

    @classmethod
    def of(cls, losses: Array, targets: Targets, *, length: int, ngrams: NGrams | None) -> Sums:
        """The model's ``losses`` [n] on targets in rows of ``length`` tokens, beside the n-grams if any."""
        losses = losses.astype(np.float64)
        by_context = ContextLosses.up_to(length)
        by_context.add(losses, targets.position)
        nats = {} if ngrams is None else ngrams.nats(targets)
        return cls({"model": float(losses.sum()), **nats}, by_context)

    @classmethod
    def total(cls, parts: list[Sums], *, length: int) -> Sums:
        """The sum of parts, added in their order."""
        sums = cls({}, ContextLosses.up_to(length))
        for part in parts:
            for name, nats in part.nats.items():
                sums.nats[name] = sums.nats.get(name, 0.0) + nats
            sums.by_context.merge(part.by_context)
        return sums

    @property
    def targets(self) -> int:
        """How many were scored."""
        return int(self.by_context.tokens.sum())

    def result(self, *, size: int, vocab_size: int) -> dict[str, Any]:
        """Loss in nats per token and bits per byte of a text of ``size`` bytes, by model and by position."""

        def entry(nats: float) -> dict[str, float]:
            return {"loss": nats / self.targets, "bits_per_byte": nats / (math.log(2) * size)}

        bigrams = {name.split("/")[1]: nats for name, nats in self.nats.items() if "/" in name}
        found: dict[str, Any] = {"model": entry(self.nats["model"])}
        if bigrams:
            lower = min(bigrams, key=bigrams.__getitem__)
            found["bigram"] = {**entry(bigrams[lower]), "lower_order": lower}
            found["bigram_by_lower_order"] = {name: entry(nats) for name, nats in bigrams.items()}
            found["unigram"] = entry(self.nats["unigram"])
        return {
            **found,
            "uniform": entry(self.targets * math.log(vocab_size)),
            "ln_vocab": math.log(vocab_size),
            "targets": self.targets,
            "bytes": size,
            "by_position": self.by_context.rows(),
        }
