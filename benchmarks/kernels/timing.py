"""Clocks, one timed forward + backward, and contenders measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Clock",
    "CudaClock",
    "HostClock",
    "Pass",
    "in_turns",
    "summaries",
    "summary",
    "timed_pass",
]


class Clock(Protocol):
    """Reads the time of the device that does the work."""

    def prepare(self) -> None:
        """Bring the device into the state that a measurement starts from."""

    def stamp(self) -> Any:
        """A point in the stream of work."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Time between two stamps; waits for the second."""


class HostClock:
    """The host's monotonic clock, for work that the host does itself."""

    def prepare(self) -> None:
        """Nothing to do: the call before has ended."""

    def stamp(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        """Time between two stamps."""
        return (end - begin) * 1e3


class CudaClock:
    """CUDA events.

    Each measurement starts behind a large fill that empties the L2 cache and keeps the GPU busy while the
    host queues the call, so the events time the kernels and not their launches.
    """

    def __init__(self, fill_bytes: int = 4 << 30) -> None:
        size = min(fill_bytes, torch.cuda.mem_get_info()[0] // 8)
        self._fill = torch.empty(size, dtype=torch.uint8, device="cuda")

    def prepare(self) -> None:
        """Wait for the device, then queue the fill."""
        torch.cuda.synchronize()
        self._fill.zero_()

    def stamp(self) -> torch.cuda.Event:
        """An event at this point of the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time between two events."""
        end.synchronize()
        return float(begin.elapsed_time(end))


@dataclass(frozen=True)
class Call:
    """One contender on one set of operands.

    Attributes:
        operands: tensors by name; gradients are taken in those that require them.
        forward: operands to the output.
    """

    operands: Mapping[str, Any]
    forward: Callable[[Mapping[str, Any]], Tensor]

    def gradients(self, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Backward of ``y`` for the upstream gradient ``dy``."""
        wanted = [x for x in self.operands.values() if x.requires_grad]
        return torch.autograd.grad(y, wanted, dy)


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one forward and backward; ``submit`` is the host's, to queue both."""

    forward: float
    backward: float
    both: float
    submit: float


def timed_pass(clock: Clock, call: Call, dy: Tensor) -> Pass:
    """Forward and backward of one call."""
    clock.prepare()
    host = time.perf_counter()
    begin = clock.stamp()
    y = call.forward(call.operands)
    middle = clock.stamp()
    call.gradients(y, dy)
    end = clock.stamp()
    submit = (time.perf_counter() - host) * 1e3
    forward, backward = clock.milliseconds(begin, middle), clock.milliseconds(middle, end)
    return Pass(forward, backward, clock.milliseconds(begin, end), submit)


def in_turns(
    contenders: Mapping[str, Callable[[int], Any]], *, repetitions: int, warmup: int = 1
) -> dict[str, list[Any]]:
    """Measure every contender once per round, so that what drifts in the machine drifts for all of them.

    A contender gets the number of the round; the ``warmup`` first rounds are dropped.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for round_ in range(warmup + repetitions):
        for name, measure in contenders.items():
            result = measure(round_)
            if round_ >= warmup:
                results[name].append(result)
    return results


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread (tenth and ninetieth percentile, least and greatest) of the measurements."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {
        "median": statistics.median(values),
        "p10": cuts[0],
        "p90": cuts[-1],
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def summaries(passes: Sequence[Pass]) -> dict[str, dict[str, float]]:
    """Median and spread of every part of the passes, in milliseconds."""
    parts = ("forward", "backward", "both", "submit")
    return {part: summary([getattr(one, part) for one in passes]) for part in parts}
