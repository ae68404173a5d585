"""How long a rank computes in a step before it first waits for its replicas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["BusyTimer", "own_seconds"]

# Linux: nanoseconds that this thread ran, those it was ready and another had the core, time slices.
SCHEDULED = "/proc/thread-self/schedstat"


def own_seconds() -> float:
    """Seconds of a clock that stands still while this thread waits for a core.

    Ranks that share the cores of a machine, with each other or with other programs, take turns: that is no
    slowness of one rank. Sleeping, input and output, and a core that is slow do count. Where the system does
    not tell (it is not Linux), it is the plain clock.
    """
    try:
        with open(SCHEDULED, encoding="ascii") as file:
            waited = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        waited = 0
    return time.perf_counter() - waited / 1e9


class BusyTimer:
    """Seconds from the start of a step to the end of its last forward pass, with the backward passes between.

    The last backward pass is left out because ZeRO exchanges gradients inside it. ``module`` is what every
    engine calls, whole: its ``LossModule``. Where a step begins on all ranks at once (after a collective, as
    in the loop), a rank that is slowed shows as a longer time of its own; ranks of one tensor or sequence
    group wait for each other inside the forward pass and show alike, and so do all ranks of an engine that
    gathers weights there (ZeRO 3, FSDP2).

    On a GPU the times are events on the stream: ``finish`` waits for the last of them, which a step whose
    loss was read has passed already.
    """

    def __init__(
        self, module: nn.Module, *, device: torch.device, clock: Callable[[], float] = own_seconds
    ) -> None:
        """Hook ``module``; ``clock`` gives seconds on a CPU."""
        self._gpu, self._clock = device.type == "cuda", clock
        self._begun: Any = None
        self._last: Any = None
        self._handle = module.register_forward_hook(self._note)

    def begin(self) -> None:
        """A step begins."""
        self._begun, self._last = self._now(), None

    def finish(self) -> float:
        """The step is over: its busy seconds; 0.0 where it had no forward pass."""
        begun, last = self._begun, self._last
        self._begun = self._last = None
        if begun is None or last is None:
            return 0.0
        if not self._gpu:
            return float(last - begun)
        last.synchronize()
        return float(begun.elapsed_time(last)) / 1000.0

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    def _note(self, *_: Any) -> None:
        if self._begun is not None:  # not inside a validation pass
            self._last = self._now()

    def _now(self) -> Any:
        if not self._gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
