"""Saving a run: what a failed save means while training, and what it means at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from checkpoints.state import SaveError, save_checkpoint
from trellis_dist.parallel import env
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.errors import EchoError
from trellis_dist.training.job import Job
from trellis_dist.training.metrics import MetricsWriter
from trellis_dist.training.state import Progress, run_state

__all__ = ["PeerSaveError", "Saver"]


class PeerSaveError(EchoError, SaveError):
    """The last save of a start failed on another rank."""


class Saver:
    """Saves checkpoints on all ranks together and counts the saves that failed."""

    def __init__(
        self, root: Path, job: Job, *, fingerprint: str, metrics: MetricsWriter, saved_step: int
    ) -> None:
        """Save into ``root``; ``saved_step`` is there already (0: nothing)."""
        self._root, self._job, self._fingerprint, self._metrics = root, job, fingerprint, metrics
        self.saved_step = saved_step
        self.failures = 0
        self.last_seconds: float | None = None

    def save(self, engine: Engine, progress: Progress, *, final: bool) -> None:
        """Save ``progress.step`` unless it is saved.

        A failure (a full disk, say) while training is announced and training goes on, with the earlier
        checkpoints intact; the ``final`` save of a start raises ``OSError`` instead.
        """
        if progress.step == self.saved_step:
            return
        start = time.monotonic()
        try:
            self._write(engine, progress)
        except SaveError as error:
            self.failures += 1
            if final and error.__cause__ is None:
                raise PeerSaveError(str(error)) from None
            if final:
                raise
            self._alert(error)
        else:
            self.saved_step = progress.step
            self.last_seconds = time.monotonic() - start

    def _write(self, engine: Engine, progress: Progress) -> None:
        state = run_state(
            self._job, progress, optimizer_steps=engine.optimizer_steps, fingerprint=self._fingerprint
        )
        save_checkpoint(
            self._root,
            step=progress.step,
            tensors=engine.logical_tensors(),
            run_state=state,
            rank=env.rank(),
            world_size=env.world_size(),
            agree=env.agree,
            keep=self._job.checkpoint.keep,
        )

    def _alert(self, error: SaveError) -> None:
        if env.is_main():
            self._metrics.say(f"alert: {error}; training goes on")
        elif error.__cause__ is not None:  # rank 0 only knows that another rank failed
            print(f"alert: {error}", file=sys.stderr, flush=True)
