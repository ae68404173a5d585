"""The numbers of an experiment's rows, from the results that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from launch.experiments.expand import Expansion
from launch.experiments.shares import NORMAL, Share, over_seeds, share_of
from launch.experiments.tables import Row
from launch.experiments.values import error_of, value_of

__all__ = ["Ours", "Results"]

# Run -> its result.
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Ours:
    """The numbers of an expansion's rows."""

    expansion: Expansion
    results: Results

    def by_seed(self, row: Row, setting: str, value: str) -> dict[int, float]:
        """Of each seed that has it."""
        name = self.expansion.scale.expand(value)
        found = {seed: value_of(result, name) for seed, result in self._of(row, setting).items()}
        return {seed: number for seed, number in found.items() if number is not None}

    def values(self, row: Row, setting: str, value: str) -> list[float]:
        """One for each seed that has it."""
        return list(self.by_seed(row, setting, value).values())

    def mean(self, row: Row, setting: str, value: str) -> float | None:
        """Over the seeds."""
        found = self.values(row, setting, value)
        return fmean(found) if found else None

    def share(self, row: Row, setting: str, value: str) -> Share | None:
        """An accuracy over the seeds with its interval; None of other numbers."""
        name = self.expansion.scale.expand(value)
        found = [share_of(result, name) for result in self._of(row, setting).values()]
        return over_seeds([share for share in found if share is not None])

    def error(self, row: Row, setting: str, value: str) -> float | None:
        """Standard error of the mean over seeds of what was looked at several times in each run."""
        name = self.expansion.scale.expand(value)
        found = [error_of(result, name) for result in self._of(row, setting).values()]
        known = [error for error in found if error is not None]
        return math.hypot(*known) / len(known) if known and len(known) == len(found) else None

    def interval(self, row: Row, setting: str, value: str) -> tuple[float, float] | None:
        """95%: of an accuracy, or of the mean over looks; None of other numbers."""
        if (share := self.share(row, setting, value)) is not None:
            return share.low, share.high
        error, mean = self.error(row, setting, value), self.mean(row, setting, value)
        return None if error is None or mean is None else (mean - NORMAL * error, mean + NORMAL * error)

    def of(self, row: Row, run: str) -> list[Mapping[str, Any]]:
        """Results of a row's run, by seed."""
        return list(self._by_seed(row, run).values())

    def _of(self, row: Row, setting: str) -> dict[int, Mapping[str, Any]]:
        return {} if setting in row.without else self._by_seed(row, self.expansion.scale.settings[setting])

    def _by_seed(self, row: Row, run: str) -> dict[int, Mapping[str, Any]]:
        specs = self.expansion.specs
        names = {
            seed: specs[key].name for seed in self.expansion.seeds if (key := (row.name, run, seed)) in specs
        }
        return {seed: self.results[name] for seed, name in names.items() if name in self.results}
