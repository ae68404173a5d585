"""Which ranks compute more slowly than the others, from everybody's busy seconds per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Straggler", "StragglerDetector"]


@dataclass(frozen=True)
class Straggler:
    """From step ``since`` on, for ``steps`` steps, ``rank`` took ``ratio`` times as long as the others."""

    rank: int
    ratio: float
    since: int
    steps: int
    host: str = ""

    def __str__(self) -> str:
        where = f" ({self.host})" if self.host else ""
        return (
            f"rank {self.rank}{where} takes {self.ratio:.1f} times as long as the others, in the last "
            f"{self.steps} steps"
        )


class StragglerDetector:
    """Compares what each rank's steps of a window take with the same of the median rank.

    Noise adds time to some steps (a page fault, a collection, another program on the core's other half), and
    a slow rank is slow in all: of each window the longest fifth is left out and the rest is averaged. The
    rank to compare with is the lower median one, which of two ranks is the quicker. On the steps recorded by
    ``benchmarks.step_times`` the largest clean ratio is 1.43, and a rank slowed twice from any step on
    reaches at least 1.66 within twenty: the default lies between.

    Ranks that wait for each other inside what is timed (one tensor or sequence group, or all ranks of an
    engine that gathers weights) take the same time: then the whole group is named, or nobody.
    """

    def __init__(
        self,
        ranks: int,
        *,
        window: int = 10,
        ratio: float = 1.55,
        kept: float = 0.8,
        hosts: Sequence[str] = (),
    ) -> None:
        """Watch ``ranks`` ranks; a rank is slow at ``ratio`` times the others' seconds."""
        assert ranks >= 1
        assert window >= 1
        assert ratio > 1, "at a ratio of 1 half of all ranks are slow"
        self._window, self._ratio, self._hosts = window, ratio, tuple(hosts)
        self._kept = max(1, round(kept * window))
        self._times: list[deque[float]] = [deque(maxlen=window) for _ in range(ranks)]
        self._slow: dict[int, Straggler] = {}

    def note(self, step: int, busy: Sequence[float]) -> list[Straggler]:
        """Take every rank's busy seconds of ``step``; return the ranks that have become slow.

        A rank is returned once, and again only after it was as quick as the others for a while.
        """
        assert len(busy) == len(self._times), f"{len(busy)} times of {len(self._times)} ranks"
        for times, seconds in zip(self._times, busy, strict=True):
            times.append(seconds)
        if len(self._times[0]) < self._window:
            return []
        own = [sum(sorted(times)[: self._kept]) / self._kept for times in self._times]
        usual = sorted(own)[(len(own) - 1) // 2]
        if usual <= 0:  # nothing was timed
            return []
        return [found for rank, mine in enumerate(own) if (found := self._judge(step, rank, mine / usual))]

    def _judge(self, step: int, rank: int, ratio: float) -> Straggler | None:
        known = self._slow.get(rank)
        # Half way back, so that a rank on the border is not announced again and again.
        if ratio < (1 + (self._ratio - 1) / 2 if known else self._ratio):
            self._slow.pop(rank, None)
            return None
        host = self._hosts[rank] if self._hosts else ""
        since = known.since if known else max(1, step - self._window + 1)
        self._slow[rank] = Straggler(rank, ratio, since, step - since + 1, host)
        return None if known else self._slow[rank]

    def report(self) -> list[str]:
        """A line for every rank that is slow now, the slowest first."""
        return [str(one) for one in sorted(self._slow.values(), key=lambda one: (-one.ratio, one.rank))]
