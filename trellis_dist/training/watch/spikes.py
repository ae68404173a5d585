"""When the loss leaps away from where it was, judged by median and spread of the last steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Spike", "SpikeDetector"]

# The median absolute deviation of normally distributed numbers is this part of their standard deviation.
MAD_OF_NORMAL = 0.6745
# A loss that hardly varies would make every step a spike.
SMALLEST_SPREAD = 1e-3  # of the median


@dataclass(frozen=True)
class Spike:
    """The loss has been ``deviations`` standard deviations and more above ``median`` for ``steps`` steps.

    ``loss`` is the last one; ``deviations`` are its own. ``began`` is the first of the steps.
    """

    loss: float
    median: float
    deviations: float
    steps: int
    began: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} is {self.deviations:.1f} deviations above the median {self.median:.4f} of "
            f"the steps before, for {self.steps} steps"
        )


class SpikeDetector:
    """Compares each loss with the ``window`` losses before it that were no spikes themselves.

    The spread is that of the losses about their own trend, so that early training, where the loss falls
    fast, does not hide a spike behind its fall. Losses that are not finite are another alarm's and are left
    out. Equal losses give equal decisions: every rank may ask its own.
    """

    def __init__(self, *, window: int = 50, deviations: float = 6.0, patience: int = 3) -> None:
        """Alarm after ``patience`` consecutive losses ``deviations`` above; silent for ``window`` steps."""
        assert window >= 4, "a spread needs a few losses"
        assert patience >= 1, "no step, no spike"
        self._deviations, self._patience = deviations, patience
        self._losses: deque[float] = deque(maxlen=window)
        self._above: list[float] = []
        self._began = 0  # step of the first loss above

    def note(self, step: int, loss: float) -> Spike | None:
        """Take the loss of ``step``, the next one; a spike is announced once, at its ``patience``-th step.

        What stays up after that is the new level: the losses of an announced spike join the window.
        """
        if not math.isfinite(loss):
            return None
        deviations = self._above_median(loss)
        if deviations < self._deviations:
            # What was up for a step or two is not kept: it says nothing about the level.
            self._above.clear()
            self._losses.append(loss)
            return None
        if not self._above:
            self._began = step
        self._above.append(loss)
        if len(self._above) < self._patience:
            return None
        median = statistics.median(self._losses)
        found = Spike(loss, median, deviations, len(self._above), self._began)
        self._losses.extend(self._above)
        self._above.clear()
        return found

    def _above_median(self, loss: float) -> float:
        """How far ``loss`` is above the window's median, in its spread; 0 while the window fills."""
        if len(self._losses) < (self._losses.maxlen or 0):
            return 0.0
        middle = statistics.median(self._losses)
        spread = _spread(list(self._losses))
        return (loss - middle) / max(spread, SMALLEST_SPREAD * abs(middle), 1e-12)

    def forget(self) -> None:
        """Start anew, after a rollback."""
        self._losses.clear()
        self._above.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"losses": list(self._losses), "above": list(self._above), "began": self._began}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; a smaller window keeps the newest losses."""
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
        self._above, self._began = [float(loss) for loss in state["above"]], int(state["began"])


def _spread(losses: list[float]) -> float:
    """Standard deviation, robustly, of the losses about a straight line through both halves' medians."""
    half = len(losses) // 2
    first, second = statistics.median(losses[:half]), statistics.median(losses[half:])
    slope = (second - first) / (len(losses) - half)
    rest = [loss - slope * index for index, loss in enumerate(losses)]
    middle = statistics.median(rest)
    return statistics.median(abs(value - middle) for value in rest) / MAD_OF_NORMAL
