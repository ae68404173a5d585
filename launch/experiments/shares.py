"""Accuracies of a result with their intervals, and whether a guess would do as well.

A share of n questions is binomial: of 20 prompts 3 right are 15% with a 95% interval from 5 to 36, and a
choice among ten is right in 10% of cases by itself. The interval is Wilson's (`evals.samples.share`), made
when the task was scored. Of rows that hold several questions, as MQAR's do, the rows count: too wide there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

__all__ = ["Share", "over_seeds", "share_of"]

# 97.5% quantile of the normal distribution.
NORMAL = 1.96


@dataclass(frozen=True)
class Share:
    """Percent right.

    Attributes:
        percent: mean over the items.
        low, high: 95% interval, in percent.
        items: prompts, rows or questions; of a mean over tasks those of the smallest.
        chance: percent that a guess gets; None where nobody knows.
    """

    percent: float
    low: float
    high: float
    items: int
    chance: float | None

    @property
    def above_chance(self) -> bool:
        """Whether the interval lies above what a guess gets."""
        return self.chance is None or self.low > self.chance

    @property
    def error(self) -> float:
        """Half the interval as a standard error, in percent."""
        return (self.high - self.low) / (2 * NORMAL)

    def __str__(self) -> str:
        """``15 (5 to 36)``, with ``*`` where a guess may do as well; as many digits as the items allow."""
        digits = 1 if self.items >= 200 else 0
        percent, low, high = (f"{value:.{digits}f}" for value in (self.percent, self.low, self.high))
        return f"{percent} ({low} to {high})" + ("" if self.above_chance else "*")


def share_of(result: Mapping[str, Any], name: str) -> Share | None:
    """The accuracy called ``name`` in a run's result; None of what is no accuracy or has no interval."""
    function, _, rest = name.partition("(")
    if function == "mean" and rest:
        parts = [share_of(result, part) for part in rest.removesuffix(")").split(",")]
        known = [part for part in parts if part is not None]
        return _mean(known) if len(known) == len(parts) else None
    task, _, rest = name.partition("/")
    score = result.get("scores", {}).get(task)
    found = None if score is None else _part(score["result"], rest)
    if score is None or found is None or "low" not in found:
        return None
    chance = _chance(score, name)
    return Share(found["score"], found["low"], found["high"], int(found["samples"]), chance)


def _part(result: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Of a task's result: of a needle's way of scoring and length, of a metric, or of a group."""
    way, _, length = name.partition("/")
    rows = {str(row["length"]): row for row in result.get("rows", ())}
    row = rows.get(length, {})
    found: Mapping[str, Any] | None = row.get(way) or result.get("metrics", {}).get(name)
    return found or result.get("groups", {}).get(name)


def _chance(score: Mapping[str, Any], name: str) -> float | None:
    """What the task says; of MQAR one of the row's own values, which needs no recall of its key either."""
    task, way, *_ = name.split("/")
    if task == "mqar":
        return 100.0 / int(way)
    if name in score.get("chance", {}):
        return float(score["chance"][name])
    known = score["result"].get("chance")  # results that were written before they kept it by name
    return float(known[way]) if isinstance(known, Mapping) and way in known else None


def _mean(parts: Sequence[Share]) -> Share:
    """Of several tasks: their questions are different ones, so that the variances add up."""
    percent = fmean(part.percent for part in parts)
    half = NORMAL * math.sqrt(sum(part.error**2 for part in parts)) / len(parts)
    chances = [part.chance for part in parts if part.chance is not None]
    chance = fmean(chances) if len(chances) == len(parts) else None
    items = min(part.items for part in parts)
    return Share(percent, max(percent - half, 0.0), min(percent + half, 100.0), items, chance)


def over_seeds(shares: Sequence[Share]) -> Share | None:
    """The mean of runs that answered the same questions: more seeds are no more questions."""
    if not shares:
        return None
    percent, low, high = (fmean(values) for values in zip(*((s.percent, s.low, s.high) for s in shares)))
    return replace(shares[0], percent=percent, low=low, high=high)
