"""One row of the fault table: what is injected, how often, and what became of it.

A row module has `ROWS: dict[int, Row]`; `python -m benchmarks.faults` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["STOCK_OUTCOMES", "Outcome", "Row", "Stock", "Trial"]

# What may become of a stock format under the same injection.
STOCK_OUTCOMES = (
    "detected",
    "loaded silently wrong",
    "crashed",
    "code executed",
    "good copy lost",
    "unharmed",
)


@dataclass(frozen=True)
class Outcome:
    """What became of one injection.

    Attributes:
        ok: the expected thing happened.
        note: what happened instead, or in which flavour; one line.
        numbers: JSON measurements; numbers of the same name are summed up over a row as median and maximum.
        of: injections of a trial that makes several (every boundary of a save, say).
        passed: how many of them were ok; all or none unless given.
    """

    ok: bool
    note: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    of: int = 1
    passed: int | None = None

    @property
    def count(self) -> int:
        """Injections that were ok."""
        return self.passed if self.passed is not None else self.of * self.ok


# Called with a folder of the trial's own, which is there and empty, and removed afterwards (its parent stays,
# for what the trials of a row share), and with the number of the trial, which decides everything drawn.
Trial = Callable[[Path, int], Outcome]
# The same injection on a stock format; returns one of STOCK_OUTCOMES.
Stock = Callable[[Path, int], str]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: what is injected.
        expected: what must become of it.
        full: trials of a full run.
        quick: trials of a quick one, numbers 0 to quick - 1.
        trial: runs one; an exception counts as a failure and its text is the note.
        stock: by name of the format.
    """

    title: str
    expected: str
    full: int
    quick: int
    trial: Trial
    stock: Mapping[str, Stock] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the counts."""
        assert 0 < self.quick <= self.full, f"{self.title}: {self.quick} quick trials of {self.full}"
