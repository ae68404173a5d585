"""How long the nodes of a run that one of them has failed are waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from launch.ranks import SLACK_S
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["Patience"]


class Patience:
    """Tells when nodes that go on after another's failure are to be asked to end, and to be asked again."""

    def __init__(
        self, *, settle_s: float, grace_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin.

        Args:
            settle_s: seconds after a failure for the others to see it, and to end by themselves.
            grace_s: of a save; who is asked again does not save.
            clock: in seconds.
        """
        self._settle_s, self._clock = settle_s, clock
        self._save_s = max(settle_s, grace_s + SLACK_S)
        self._failed: float | None = None
        self._asked: float | None = None

    def asked(self) -> None:
        """Note that the nodes are asked to end now."""
        self._asked = self._clock()

    def is_over(self, ends: Sequence[int | None]) -> bool:
        """Whether to ask now those that still run, by the exit statuses so far; noted as `asked`."""
        now = self._clock()
        # A node that ended as it was asked to is no failure: the others are still saving.
        if self._failed is None and any(end not in (None, 0, EXIT_TERMINATED) for end in ends):
            self._failed = now
        if self._failed is None or now < self._failed + self._settle_s:
            return False
        if self._asked is not None and now < self._asked + self._save_s:
            return False
        self.asked()
        return True
