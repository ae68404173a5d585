"""A stage over several sources: which units are still to be made, and how many of them a budget needs.

Units finish in any order and with any number of workers, so a budget is filled by the units that follow one
another from the first: how many that are depends on the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from data_pipeline.progress import Bar
from data_pipeline.workers import Workers

__all__ = ["Lead", "Line", "ahead", "run_lines"]

# Units looked up (hashed) together, by threads; a budget's stage looks no farther ahead than this.
AHEAD = 64
T = TypeVar("T")
S = TypeVar("S")


@dataclass
class Lead:
    """Entries of units that come in any order; sums over those that follow one another from the first.

    Attributes:
        limits: name -> how much is wanted; the lead is full when one of them is reached. Empty: never.
        entries: unit.json of each unit, by number.
        sums: name -> sum over the leading units.
        count: leading units, up to the one that fills it.
    """

    limits: Mapping[str, float]
    measure: Callable[[dict[str, Any]], Mapping[str, float]]
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @property
    def full(self) -> bool:
        """Whether the leading units hold what is wanted."""
        return any(self.sums.get(name, 0) >= limit for name, limit in self.limits.items())

    def put(self, index: int, entry: dict[str, Any]) -> None:
        """Unit `index` is made."""
        self.entries[index] = entry
        while not self.full and self.count in self.entries:
            for name, value in self.measure(self.entries[self.count]).items():
                self.sums[name] = self.sums.get(name, 0) + value
            self.count += 1

    def raise_limits(self, limits: Mapping[str, float]) -> None:
        """Want more; units that were beyond the old limits may lead now."""
        self.limits, self.sums, self.count = limits, {}, 0
        known, self.entries = self.entries, {}
        for index, entry in known.items():
            self.put(index, entry)

    def leading(self) -> list[dict[str, Any]]:
        """Entries of the leading units, in order."""
        return [self.entries[index] for index in range(self.count)]


@dataclass
class Line:
    """One source's units in one stage.

    Attributes:
        lead: where entries go.
        calls: in order, the number of each unit, its arguments, and its entry where it is committed already.
    """

    lead: Lead
    calls: Iterator[tuple[int, tuple[Any, ...], dict[str, Any] | None]]


def run_lines(
    workers: Workers, function: Callable[..., dict[str, Any]], lines: Sequence[Line], bar: Bar
) -> None:
    """Make the missing units of all lines, until each is full or at its end.

    Raises:
        Exception: what a unit raised; what is committed stays.
    """
    places: list[tuple[Line, int]] = []

    def missing() -> Iterator[tuple[Any, ...]]:
        for line in lines:
            for index, call, entry in line.calls:
                if entry is None:
                    if not places:
                        workers.start()
                        bar.restart()
                    places.append((line, index))
                    yield call
                else:
                    line.lead.put(index, entry)
                    bar.count(entry, reused=True)
                if line.lead.full:
                    break

    with bar, closing(workers.run(function, missing())) as results:
        for position, entry in results:
            line, index = places[position]
            line.lead.put(index, entry)
            bar.count(entry)
            if all(line.lead.full for line in lines):
                break


def ahead(function: Callable[[S], T], values: Iterator[S], *, threads: int) -> Iterator[T]:
    """``map(function, values)``, `AHEAD` of them at a time by `threads` threads."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        while batch := list(islice(values, AHEAD)):
            yield from pool.map(function, batch)
