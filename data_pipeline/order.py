"""Which row comes when: arithmetic only, the same on every rank of any mesh.

The order of an epoch is a keyed permutation computed row by row: nothing is stored. Several sources are
blended by their weights: an epoch of the mixture has as many samples N as all sources have rows, source k
supplies n_k of them, and takes them from its own permutations, one after the other. So a source whose weight
is above its share of the rows is repeated, and one below goes on where the epoch before stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction

import numpy as np

__all__ = ["EpochOrder", "MixtureOrder", "RunOrder", "shares"]

ROUNDS = 6


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
        epochs = samples // self.size
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
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


class MixtureOrder:
    """The order of the rows of several sources, numbered source after source.

    A single source keeps the order of `EpochOrder(fingerprint, seed, size)`, whatever its weight.

    Attributes:
        size: N, samples of an epoch: the rows of all sources together.
        shares: source -> n_k, its samples in an epoch of the mixture.
    """

    def __init__(
        self,
        fingerprint: str,
        seed: int,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        unit: str = "rows",
    ) -> None:
        """Take the rows of each source, in order, and the weights of some (`shares` says how, and raises)."""
        self.size = sum(sizes.values())
        self.shares = shares(sizes, weights or {}, unit=unit)
        self._whole = EpochOrder(fingerprint, seed, self.size)
        self._alone = len(sizes) == 1
        self._sources = [EpochOrder(f"{fingerprint}/{name}", seed, size) for name, size in sizes.items()]
        self._first_row = np.cumsum([0, *sizes.values()])
        self._first_place = np.cumsum([0, *self.shares.values()])

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Row, in [0, size), of each global sample number (int64, 1-D)."""
        places = self._whole.rows(samples)
        if self._alone:
            return places
        rows, epochs = np.empty_like(samples), samples // self.size
        found = np.searchsorted(self._first_place, places, side="right") - 1
        for k in np.unique(found):
            chosen, (first, after) = found == k, self._first_place[k : k + 2]
            counters = epochs[chosen] * (after - first) + places[chosen] - first
            rows[chosen] = self._sources[k].rows(counters) + self._first_row[k]
        return rows


class RunOrder:
    """Runs of consecutive rows in the order of a mixture, each read by one place of consecutive batches.

    With runs of n rows and batches of G: sample s is at place j = s mod G of batch k = s div G, and reads row
    k mod n of the run that a `MixtureOrder` of runs has for number (k div n) G + j. Runs of one row are the
    order of the rows themselves. The last run of a source ends with its last row: where n does not divide the
    rows, some of it is in the run before as well.

    Attributes:
        length: n, rows of a run.
        size: samples of an epoch: n times the runs of all sources.
        shares: source -> its samples in an epoch of the mixture.
    """

    def __init__(
        self,
        fingerprint: str,
        seed: int,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        length: int = 1,
    ) -> None:
        """Take the rows of each source, in order, and the weights of some (`shares` says how, and raises).

        Raises:
            ValueError: a source has rows, but fewer than n.
        """
        self.length = length
        for name, size in sizes.items():
            if 0 < size < length:
                raise ValueError(
                    f"data.carry_rows = {length}, but source {name!r} has {size} rows: use {size} or fewer"
                )
        runs = {name: -(-size // length) for name, size in sizes.items()}
        if weights and length > 1:
            weights = {name: size for name, size in sizes.items() if size} | dict(weights)
        self._runs = MixtureOrder(fingerprint, seed, runs, weights, unit=_unit(length))
        self.size = self._runs.size * length
        self.shares = {name: count * length for name, count in self._runs.shares.items()}
        self._first_run = np.cumsum([0, *runs.values()])
        self._first_row, self._sizes = np.cumsum([0, *sizes.values()]), np.array(list(sizes.values()))

    def rows(self, samples: np.ndarray, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row of each sample (int64, 1-D), and its place in its run."""
        if self.length == 1:
            return self._runs.rows(samples), np.zeros_like(samples)
        batches, places = samples // global_batch, samples % global_batch
        inside = batches % self.length
        runs = self._runs.rows(batches // self.length * global_batch + places)
        source = np.searchsorted(self._first_run, runs, side="right") - 1
        begin = np.minimum((runs - self._first_run[source]) * self.length, self._sizes[source] - self.length)
        return self._first_row[source] + begin + inside, inside


def _unit(length: int) -> str:
    return "rows" if length == 1 else f"runs of data.carry_rows = {length} rows"


def shares(sizes: Mapping[str, int], weights: Mapping[str, float], *, unit: str = "rows") -> dict[str, int]:
    """How many of an epoch's N = sum(sizes) samples come from each source: N w_k / sum(w), rounded.

    The rounding keeps the sum (largest remainder, the earlier source first). A source without a weight has
    its number of rows for one, so without any every row is taken once.

    Raises:
        ValueError: a weight for a source that is not there, that has no rows, or that is no number above 0,
            or a source with rows whose share is rounded to none of the samples.
    """
    for name, weight in weights.items():
        if name not in sizes:
            raise ValueError(
                f"data.mixture.{name} has a weight, but the data set has no source {name!r}: it has "
                f"{', '.join(sizes)}; run `trellis prepare` with this mixture"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.mixture.{name}.weight = {weight}: use a number above 0")
        if not sizes[name]:
            raise ValueError(f"data.mixture.{name} has a weight, but no rows: use more text, or leave it out")
    given = [Fraction(weights.get(name, size)) for name, size in sizes.items()]
    exact = [sum(sizes.values()) * weight / (sum(given) or 1) for weight in given]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: sum(sizes.values()) - sum(counts)]:
        counts[k] += 1
    for name, own, count in zip(sizes, given, counts):
        if sizes[name] and not count:
            others = sum(given, start=-own)
            raise ValueError(_never_seen(name, own, others, sum(sizes.values()), unit))
    return dict(zip(sizes, counts))


def _never_seen(name: str, weight: Fraction, others: Fraction, samples: int, unit: str) -> str:
    """What is wrong with a weight that gives less than one sample: N w / (w + others) >= 1 needs more."""
    least = Decimal(others.numerator) / Decimal(others.denominator) / (samples - 1)
    step = Decimal(1).scaleb(least.adjusted() - 2)
    enough = float(least.quantize(step, rounding=ROUND_CEILING))
    return (
        f"data.mixture.{name}.weight = {float(weight):g} beside {float(others):g} of the other sources gives "
        f"none of the {samples:,} {unit} of an epoch, so it would never be read: use {enough:g} or more, or "
        "leave it out"
    )
