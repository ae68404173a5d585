"""Saving a run: in the background while it trains, waited for at the end, and what a failure means.

save      a snapshot is begun; training goes on with the next step's passes and waits for the copies, if it
          must, before the update that changes weights
settle    once a step, with the statuses of all ranks: the step is committed, or lost, or still being written
finish    the last save of a start, and whatever is still in flight, to its end
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints.background import BackgroundSaver, Settled
from checkpoints.commit import attempt_name, list_steps, process_name, step_name
from checkpoints.retention import retain, retention_of
from checkpoints.save import SaveError
from checkpoints.upload import Uploader
from trellis_dist.files import REAL, FileSystem
from trellis_dist.parallel import env
from trellis_dist.training.collectives import gather_scalars
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.errors import EchoError
from trellis_dist.training.guards import Guards
from trellis_dist.training.job import Job
from trellis_dist.training.metrics import MetricsWriter
from trellis_dist.training.rng import random_states
from trellis_dist.training.state import Progress, Start, run_state

__all__ = ["PeerSaveError", "Saver", "upload_newest"]

POLL_S = 0.1
UPLOAD_S = 600.0  # what the last upload of a start may take after its last step
ERROR_S = 5.0  # what a writer may take to notice that the run failed
# Replaced by tests.
FILE_SYSTEM: FileSystem = REAL


class PeerSaveError(EchoError, SaveError):
    """The last save of a start failed on another rank."""


class Saver:
    """Saves checkpoints on all ranks together and counts the saves that failed."""

    def __init__(
        self,
        root: Path,
        job: Job,
        *,
        fingerprint: str,
        metrics: MetricsWriter,
        start: Start,
        guards: Guards,
    ) -> None:
        """Save into ``root`` what goes on from ``start``. Every rank calls this."""
        saved_step = start.progress.step
        self._origin, self._guards = start.origin, guards
        self.pending_row: Mapping[str, float] = {}  # of a step whose validation was broken off
        self.root, self._job, self._fingerprint, self._metrics = root, job, fingerprint, metrics
        self.saved_step = saved_step
        self.failures = 0
        self._process, self._started = env.broadcast_object(process_name()), 0
        self._messages: deque[str] = deque()  # from the thread that removes old checkpoints
        self._blocked = 0.0  # seconds that training waited for the save in flight
        self._times: dict[str, float] = {}
        self._last_seconds = 0.0
        self._retains = True
        self._deadline: float | None = None  # until when close may wait; None before a start has ended well
        upload = job.checkpoint.upload if env.is_main() else ""
        self._uploader = Uploader(root, upload) if upload else None
        if self._uploader is not None and saved_step:
            self._uploader.submit(root / step_name(saved_step))  # a look, where it was sent before
        self._saver = BackgroundSaver(
            root,
            rank=env.rank(),
            world_size=env.world_size(),
            name=self._attempt,
            afterwards=self._afterwards,
            file_system=FILE_SYSTEM,
        )

    def _attempt(self, step: int) -> str:
        return attempt_name(step, process=self._process, number=self._started)

    @property
    def status(self) -> int:
        """Where this rank's share of the save in flight is, for ``settle`` on all ranks."""
        return int(self._saver.status)

    def save(self, engine: Engine, progress: Progress, *, measured: Mapping[str, float]) -> None:
        """Begin to save ``progress.step`` unless it is saved; without ``checkpoint.background`` wait for it.

        ``measured`` is what a retention by metric may go by: numbers of this very step. A failure (a full
        disk, say) is announced when it is settled, and training goes on with the earlier checkpoints intact.
        """
        if self._begin(engine, progress, measured) and not self._job.checkpoint.background:
            self.drain()

    def finish(
        self,
        engine: Engine,
        progress: Progress,
        *,
        measured: Mapping[str, float],
        within: float = math.inf,
    ) -> bool:
        """Bring the save in flight to its end and save ``progress.step`` unless it is saved.

        With ``within`` seconds left (the fewest of all ranks count) nothing is done that can wait for the
        next start, and after a save in flight no other is begun that would not fit.

        Returns:
            Whether the last step is saved, the same on every rank.

        Raises:
            SaveError: it failed, here or (``PeerSaveError``) on another rank; on every rank.
        """
        deadline = time.monotonic() + min(row[0] for row in gather_scalars([within]))
        self._retains = deadline == math.inf
        flying = self._saver.in_flight is not None
        self.drain()
        if not flying or self._fits(deadline) or progress.step == self.saved_step:
            self._save_last(engine, progress, measured)
        self._deadline = min(deadline, time.monotonic() + UPLOAD_S)
        self._say_times()
        return self.saved_step == progress.step

    def _say_times(self) -> None:
        """Of saves that no row comes after."""
        told = self.times()
        if "perf/save_seconds" in told:
            self._metrics.say(
                f"the last save took {told['perf/save_seconds']:.2f} s; since the last row the run waited "
                f"{told['perf/save_blocked_seconds']:.2f} s for saves"
            )

    def _save_last(self, engine: Engine, progress: Progress, measured: Mapping[str, float]) -> None:
        if not self._begin(engine, progress, measured):
            return
        result = self.drain(last=True)
        assert result is not None, "a save in flight ends"
        if result.error is not None:
            raise result.error
        if result.failed:
            raise PeerSaveError(_not_saved(result))

    def _fits(self, deadline: float) -> bool:
        """Whether a save that takes as long as the last one on any rank ends before the deadline on all."""
        left = deadline - time.monotonic()
        return all(row[0] for row in gather_scalars([self._last_seconds <= left]))

    def settle(self, statuses: Sequence[float]) -> None:
        """Take note of a save that ended, given what all ranks said of theirs at the same moment."""
        self._take(self._saver.settle([int(status) for status in statuses]))
        self._say_messages()

    def _say_messages(self) -> None:
        while self._messages:
            self._metrics.say(self._messages.popleft())
        for line in self._uploader.pop_messages() if self._uploader else ():
            self._metrics.say(f"upload: {line}")

    def _begin(self, engine: Engine, progress: Progress, measured: Mapping[str, float]) -> bool:
        """Start the save of this step; False when it is there already."""
        self.drain()  # with saves this slow, training waits for them
        if progress.step == self.saved_step:
            return False
        state = run_state(
            self._job,
            progress,
            optimizer_steps=engine.optimizer_steps,
            fingerprint=self._fingerprint,
            measured=measured,
            origin=self._origin,
            guards=self._guards.state(),
            pending_row=self.pending_row,
        )
        began = time.monotonic()
        self._started += 1
        self._saver.start(
            progress.step,
            [*engine.logical_tensors(), *random_states()],
            state,
            copy=self._job.checkpoint.background,
        )
        engine.before_update = self._wait_copied
        self._blocked += time.monotonic() - began
        return True

    def _wait_copied(self) -> None:
        began = time.monotonic()
        self._saver.wait_copied()
        self._blocked += time.monotonic() - began

    def drain(self, *, last: bool = False) -> Settled | None:
        """Wait, on all ranks together, until the save in flight is settled; the ``last`` is not announced."""
        began, result = time.monotonic(), None
        while self._saver.in_flight is not None:
            self._saver.wait(POLL_S)
            result = self._saver.settle([int(row[0]) for row in gather_scalars([self._saver.status])])
            if result is not None:
                self._blocked += time.monotonic() - began
                self._take(result, announce=not last)
        return result

    def _take(self, result: Settled | None, *, announce: bool = True) -> None:
        if result is None:
            return
        if result.failed:
            self.failures += 1
            if announce:
                self._alert(result)
        else:
            self.saved_step = result.step
            self._last_seconds = result.seconds
            self._times["perf/save_seconds"] = result.seconds
        waited = self._times.get("perf/save_blocked_seconds", 0.0) + self._blocked
        self._times["perf/save_blocked_seconds"], self._blocked = waited, 0.0

    def times(self) -> dict[str, float]:
        """Seconds the last save took, and training waited for all since they were told; empty without one."""
        told, self._times = self._times, {}
        return told

    def _alert(self, result: Settled) -> None:
        if env.is_main():
            self._metrics.say(f"alert: {result.error or _not_saved(result)}; training goes on")
        elif result.error is not None:  # rank 0 only knows which rank failed
            print(f"alert: {result.error}", file=sys.stderr, flush=True)

    def _afterwards(self, committed: Path) -> None:
        """The new step is in; failing to remove an old one must not turn that into an error."""
        if self._uploader is not None:
            self._uploader.submit(committed)  # pinned before old ones go
        if not self._retains:
            return  # somebody waits for the end of this process; the next start has the time
        try:
            retain(self.root, retention_of(self._job.checkpoint), file_system=FILE_SYSTEM)
        except OSError as error:
            self._messages.append(f"alert: an old checkpoint in {self.root} could not be removed: {error}")

    def _left(self) -> float:
        return max(0.0, (self._deadline or 0.0) - time.monotonic())

    def rest(self) -> None:
        """Wait until the save in flight is settled and old checkpoints are removed; every rank calls it."""
        self.drain()
        self._saver.rest()

    def close(self) -> None:
        """Drop a save in flight; after ``finish`` wait for what the last one still removes and uploads.

        After an error nothing is waited for but a moment: somebody is to be told.
        """
        self._saver.close(ERROR_S if self._deadline is None else self._left())
        if self._uploader is not None and not self._uploader.close(self._left()):
            self._metrics.say(
                "alert: the last upload was given up; the next start sends that checkpoint again"
            )
        self._say_messages()


def upload_newest(root: Path, url: str) -> list[str]:
    """Send the newest checkpoint of a finished run, if it is not there yet; returns lines for the log."""
    newest = next(iter(list_steps(root).values()), None)
    if newest is None or not url:
        return []
    uploader = Uploader(root, url)
    uploader.submit(newest)
    if not uploader.close(UPLOAD_S):
        return [f"{newest.name} is not uploaded: it took more than {UPLOAD_S:.0f} s"]
    return uploader.pop_messages()


def _not_saved(result: Settled) -> str:
    ranks = ", ".join(map(str, result.failed))
    return (
        f"checkpoint of step {result.step} not saved: another rank failed (rank {ranks}), which says why; "
        "earlier ones are intact"
    )
