"""What ends a run that no longer gets anywhere: a step that hangs, updates that are never applied."""

from __future__ import annotations

import faulthandler
import sys

from trellis_dist.training.engines.base import StepResult

__all__ = ["DivergedError", "SkipBudget", "Watchdog"]


class Watchdog:
    """Dumps the stacks of all threads and exits with status 1 when a phase outlives its time.

    The timer runs in C (faulthandler), so it fires while Python waits inside a collective. A timeout of 0
    leaves it off.
    """

    def __init__(self, *, first_step_s: float, step_s: float) -> None:
        """Take the long timeout (first step, validation, saves) and the short one (later steps)."""
        self._long, self._short = first_step_s, step_s
        self._armed = False

    def arm(self, *, long: bool) -> None:
        """Restart the clock for the next phase."""
        seconds = self._long if long else self._short
        self.disarm()
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
            self._armed = True

    def disarm(self) -> None:
        """Stop the clock, if it is ours."""
        if self._armed:
            faulthandler.cancel_dump_traceback_later()
            self._armed = False


class DivergedError(ValueError):
    """Too many consecutive steps had a non-finite loss or gradient."""


class SkipBudget:
    """Counts consecutive skipped updates; every rank sees the same results and stops at the same step."""

    def __init__(self, allowed: int) -> None:
        """Allow ``allowed`` consecutive skips."""
        self._allowed = allowed
        self.consecutive = 0

    def note(self, step: int, result: StepResult) -> None:
        """Count ``result``; raises ``DivergedError`` when the budget is exceeded."""
        if result.applied:
            self.consecutive = 0
            return
        self.consecutive += 1
        if self.consecutive > self._allowed:
            raise DivergedError(
                f"training diverged: {self.consecutive} updates in a row had a non-finite loss or gradient "
                f"(step {step}: loss {result.loss}, gradient norm {result.grad_norm}), more than "
                f"training.max_skipped_steps = {self._allowed}: start again in another --run-dir with a "
                "lower optimizer.lr or a longer schedule.warmup_steps"
            )
