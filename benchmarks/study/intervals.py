"""What the study says of differences: paired, with bootstrap intervals over books x seeds, and the gates.

Losses are sums of nats by seed, book and part of a book. A resample draws seeds, books, and of every book
drawn its parts, each with replacement and all models alike: a model's seed s reads the training rows in the
same order as every other's, and all are scored on the same targets, so differences are paired.

With n books or seeds the variance of such a resample is (n - 1) / n of the variance it stands for, and that
of so few is itself uncertain, so deviations from the estimate are widened by sqrt(n / (n - 1)) and by
Student's t with n - 1 degrees of freedom over the normal quantile, n the smaller of the two. Of n = 2 t is
12.7, with which an interval says nothing: there it is left out, and the interval is too narrow. The tests
measure both.

Shapes: S seeds, B books, P parts of each, K ranges of positions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BELOW_BIGRAM", "EARLY", "LATE", "Draws", "Interval", "Losses", "counts", "difference", "falls"]

Array = NDArray[np.float64]

# A ranking counts where every model in it is at least this far below the bigram, in nats per token.
BELOW_BIGRAM = 0.2
# Positions [from, to) whose losses the other gate compares; LATE has no end.
EARLY, LATE = (64, 128), 512
RESAMPLES, SEED, LEVEL = 4000, 9, 0.95
# 97.5% quantiles: of the normal distribution, and of Student's t by number of books or seeds.
NORMAL, STUDENT = 1.960, {3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Losses:
    """One model on one split, over its seeds.

    Attributes:
        nats: [S, B, P, K] sums over targets.
        tokens: [B, P, K] targets.
        edges: [K] first position of each range, from 0.
        seeds: the S seeds.
        books: the B books.
    """

    nats: Array
    tokens: Array
    edges: tuple[int, ...]
    seeds: tuple[int, ...]
    books: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Nats per token over everything."""
        return float(self.nats.sum() / (self.tokens.sum() * len(self.seeds)))

    def by_position(self) -> list[float]:
        """Nats per token of each range of positions, nan where it holds no target."""
        tokens = self.tokens.sum((0, 1)) * len(self.seeds)
        with np.errstate(invalid="ignore"):
            found: list[float] = (self.nats.sum((0, 1, 2)) / tokens).tolist()
        return found

    def of_seeds(self, seeds: Sequence[int]) -> Losses:
        """Of some of the seeds, in that order."""
        places = [self.seeds.index(seed) for seed in seeds]
        return Losses(self.nats[places], self.tokens, self.edges, tuple(seeds), self.books)

    def at(self, begin: int, end: float) -> tuple[Array, Array]:
        """Sums [S, B, P] and targets [B, P] of the ranges that lie in positions [begin, end)."""
        ends = [*self.edges[1:], math.inf]
        inside = [begin <= low and high <= end for low, high in zip(self.edges, ends)]
        return self.nats[..., inside].sum(-1), self.tokens[..., inside].sum(-1)


@dataclass(frozen=True)
class Interval:
    """An estimate in nats per token, its 95% interval, and what was resampled.

    Attributes:
        seeds: how many; with 1 the interval says nothing of other seeds.
    """

    estimate: float
    low: float
    high: float
    seeds: int
    books: int

    @property
    def over(self) -> str:
        """In words."""
        return "books x seeds" if self.seeds > 1 else "books only (one seed)"

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0

    def row(self) -> dict[str, Any]:
        """JSON types."""
        numbers = {"estimate": self.estimate, "low": self.low, "high": self.high}
        return {key: round(value, 5) for key, value in numbers.items()} | {"over": self.over}


class Draws:
    """R resamples of S seeds, B books and P parts of each: how often each is in."""

    def __init__(
        self, *, seeds: int, books: int, parts: int, resamples: int = RESAMPLES, seed: int = SEED
    ) -> None:
        rng = np.random.default_rng([seed, seeds, books, parts])
        self.shape = (seeds, books, parts)
        self._seeds = rng.multinomial(seeds, [1 / seeds] * seeds, resamples) / seeds  # [R, S]
        times = rng.multinomial(books, [1 / books] * books, resamples)  # [R, B]
        # A book that is drawn twice has its parts drawn anew: 2 P parts of it in all.
        self._parts = rng.multinomial(times * parts, [1 / parts] * parts).astype(np.float64)  # [R, B, P]

    def total(self, nats: Array) -> Array:
        """[R] of sums [S, B, P] (the mean over seeds, the sum over the rest) or of targets [B, P]."""
        if nats.ndim == 2:
            nats = np.broadcast_to(nats, self.shape)
        found: Array = np.einsum("rs,rbp,sbp->r", self._seeds, self._parts, nats, optimize=True)
        return found

    def interval(self, estimate: float, resampled: Array) -> Interval:
        """The percentile interval of [R] values around their estimate, widened (module docstring)."""
        seeds, books, _ = self.shape
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(resampled, [tail, 1 - tail])
        least = min(n for n in (seeds, books) if n > 1) if max(seeds, books) > 1 else 0
        wider = _wider(least) if least else math.inf
        return Interval(
            estimate=estimate,
            low=estimate - wider * (estimate - float(low)),
            high=estimate + wider * (float(high) - estimate),
            seeds=seeds,
            books=books,
        )


def _wider(n: int) -> float:
    """The factor on deviations with n books or seeds (module docstring); with more than 5 that of 5."""
    student = STUDENT[min(n, max(STUDENT))] / NORMAL if n > 2 else 1.0
    return math.sqrt(n / (n - 1)) * student


def _draws(losses: Losses) -> Draws:
    seeds, books, parts, _ = losses.nats.shape
    return Draws(seeds=seeds, books=books, parts=parts)


def difference(one: Losses, other: Losses) -> Interval:
    """Nats per token of ``one`` minus ``other``, paired over the seeds that both have.

    Raises:
        ValueError: they have no seed in common, or were scored on other targets.
    """
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    if not seeds or one.books != other.books or not np.array_equal(one.tokens.sum(-1), other.tokens.sum(-1)):
        raise ValueError(
            f"seeds {one.seeds} on {one.books} and {other.seeds} on {other.books} cannot be paired: score "
            "both on the same split, and train one seed in common"
        )
    first, second = one.of_seeds(seeds), other.of_seeds(seeds)
    nats, tokens, draws = (first.nats - second.nats).sum(-1), one.tokens.sum(-1), _draws(first)
    estimate = float(nats.sum() / (tokens.sum() * len(seeds)))
    return draws.interval(estimate, draws.total(nats) / draws.total(tokens))


def falls(losses: Losses) -> Interval:
    """Nats per token at positions from 512 on, minus those at 64 to 127."""
    late, late_tokens = losses.at(LATE, math.inf)
    early, early_tokens = losses.at(*EARLY)
    draws, seeds = _draws(losses), len(losses.seeds)
    estimate = (late.sum() / late_tokens.sum() - early.sum() / early_tokens.sum()) / seeds
    resampled = draws.total(late) / draws.total(late_tokens) - draws.total(early) / draws.total(early_tokens)
    return draws.interval(float(estimate), resampled)


def counts(losses: Losses, bigram: float) -> list[str]:
    """Why a model may not be ranked: empty where it may. ``bigram``: its loss on the same targets."""
    reasons = []
    if (gap := bigram - losses.mean) < BELOW_BIGRAM:
        reasons.append(f"{gap:.2f} nats below the bigram's {bigram:.2f}; {BELOW_BIGRAM} are needed")
    if not (fall := falls(losses)).below_zero:
        interval = f"{fall.estimate:+.3f} [{fall.low:+.3f}, {fall.high:+.3f}]"
        reasons.append(
            f"its loss from position {LATE} on, less that at {EARLY[0]}-{EARLY[1]}, is {interval}: not below"
        )
    return reasons
