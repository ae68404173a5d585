"""What a step spends its time on: passes, what waits for other ranks, the update; how long this rank slept.

The engine says where it is (its ``enter`` hook, and the hooks of the module that is called once per
micro-batch). On a CPU the marks are readings of a clock, on a GPU events on the stream, read a step later,
when they have long passed: no step waits for them, and a row for the end of its own step only.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from trellis_dist.training.engines.base import Engine

__all__ = ["StepClock", "slept_seconds"]

# What begins at a mark; the words are those of engines/common.py.
_BEGINS = {
    "sum of the losses": "reduction",
    "reduction of the gradients": "reduction",
    "copies of a save": "copies",
    "update of the weights": "update",
}
# Linux: nanoseconds that this thread ran, those it was ready and another had the core, time slices.
SCHEDULED = "/proc/thread-self/schedstat"


def slept_seconds() -> float | None:
    """A clock that goes on only while this thread waits for something that is not a core.

    In a training step on a CPU that is other ranks: every library's collectives and transfers sleep until
    the others' part is there. None where the system does not tell (it is not Linux).
    """
    try:
        with open(SCHEDULED, encoding="ascii") as file:
            ran, waited = map(int, file.read().split()[:2])
    except (OSError, ValueError):
        return None
    return time.perf_counter() - (ran + waited) / 1e9


class StepClock:
    """Seconds per part of the steps between ``begin`` and ``end``, summed until they are asked for.

    Parts: "forward", "backward", "reduction" (from the end of the last backward pass: waiting for slower
    ranks, summing losses and what is left of the gradients), "copies" (waiting for those of a save), "update"
    (norm, clipping, optimizer, and what its library exchanges there).
    """

    def __init__(self, engine: Engine, *, device: torch.device) -> None:
        """Listen to ``engine``, behind whoever listens already."""
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []  # of the step before
        self._on = False
        self._sums: dict[str, float] = {}
        self._sleep_clock = (lambda: None) if self._gpu else slept_seconds
        self._asleep: float | None = None  # that clock, where a part began whose sleep counts
        self._slept = 0.0
        self._next, engine.enter = engine.enter, self._enter
        # Before the hooks of a library: FSDP2 gathers weights in its own.
        engine.forward_module.register_forward_pre_hook(lambda *_: self._mark("forward"), prepend=True)
        engine.forward_module.register_forward_hook(lambda *_: self._mark("backward"))

    def begin(self) -> None:
        """A step begins."""
        self._on = True
        self._asleep = self._sleep_clock()

    def end(self) -> None:
        """The step is over."""
        self._mark("end")
        self._on = False
        self._count_sleep()
        self._add(self._before)
        self._before, self._marks = self._marks, []

    def parts(self) -> dict[str, float]:
        """Seconds by part since they were last asked for."""
        if self._before and self._gpu:
            self._before[-1][1].synchronize()
        self._add(self._before)
        self._before = []
        found, self._sums = self._sums, {}
        return found

    def slept(self) -> float | None:
        """Seconds slept in all parts but "copies" since last asked for; None where nobody knows (a GPU)."""
        found, self._slept = self._slept, 0.0
        return None if self._sleep_clock() is None else found

    def _count_sleep(self) -> None:
        now = self._sleep_clock()
        if now is not None and self._asleep is not None:
            self._slept += now - self._asleep
        self._asleep = None

    def _enter(self, operation: str) -> None:
        part = _BEGINS.get(operation)
        if part is not None and self._on:
            self._mark(part)
            if part == "copies":
                self._count_sleep()
            elif self._asleep is None:
                self._asleep = self._sleep_clock()
        if self._next is not None:
            self._next(operation)

    def _mark(self, begins: str) -> None:
        if self._on:  # not inside a validation pass
            self._marks.append((begins, self._now()))

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, marks: list[tuple[str, Any]]) -> None:
        for (part, begin), (_, end) in itertools.pairwise(marks):
            seconds = begin.elapsed_time(end) / 1000.0 if self._gpu else end - begin
            self._sums[part] = self._sums.get(part, 0.0) + seconds
