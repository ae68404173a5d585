"""A request to end, remembered until a step boundary."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["SIGNALS", "TerminationRequest"]

# What schedulers announce the end with: SIGTERM almost all, SIGUSR1 those (Slurm) that are told to.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One request may come twice: from a scheduler that signals every process, and again through the launcher.
REPEAT_S = 2.0


class TerminationRequest:
    """While entered, SIGTERM and SIGUSR1 are remembered instead of ending the process; a second request does.

    A signal within ``REPEAT_S`` seconds of the first belongs to the first request. Signals reach the main
    thread only; entered elsewhere, it never receives any.

    Attributes:
        received: whether one came.
        name: which, "" before one came.
    """

    def __init__(self) -> None:
        self.received = False
        self.name = ""
        self._at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def waited(self) -> float:
        """Seconds since the signal came; 0 before it."""
        return time.monotonic() - self._at if self.received else 0.0

    def __enter__(self) -> TerminationRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self._at, self.name, self.received = time.monotonic(), signal.Signals(number).name, True
        elif self.waited > REPEAT_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
