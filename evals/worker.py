"""A worker: leases a job, renews the lease while it runs, stores the result. Any number may share a queue."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from evals.config import EvalConfig
from evals.evaluate import Job, job_of, log_scalars, run_job, score_subject, stored_result
from evals.folders import PublicError, Runs
from evals.pins import unpin_job
from evals.places import NO_STEP
from evals.queue import Queue, QueuedJob
from evals.runs import LoadedRun, checkpoint_digest, load_run, read_recipe
from evals.sharing import finish, settle
from evals.subject import Subject
from evals.tasks.registry import get_task
from trellis_dist.files import digest

__all__ = [
    "JOB_SECONDS",
    "LEASE_SECONDS",
    "LOST",
    "JobSource",
    "LocalJobs",
    "Worker",
    "end_process",
    "work_once",
]

LEASE_SECONDS = 60.0
# Most seconds between two looks whether a running job was cancelled.
BEAT_SECONDS = 2.0
POLL_SECONDS = 0.5
# A task that takes longer is taken for stuck.
JOB_SECONDS = 6 * 3600.0
CHANGED = "the run, its recipe or its data changed since the job was queued: submit it again"
# Exit status of a worker whose job was taken away: the only way to stop a task in the midst of it.
LOST = 3
_log = logging.getLogger(__name__)


class JobSource(Protocol):
    """Where jobs come from and results go: the queue itself, or its server over HTTP (`evals.remote`)."""

    def lease(self, owner: str, *, seconds: float) -> QueuedJob | None:
        """As `Queue.lease`."""

    def renew(self, key: str, owner: str, *, seconds: float) -> bool:
        """As `Queue.renew`."""

    def finish(self, key: str, record: Mapping[str, Any]) -> bool:
        """As `Queue.finish`; every run with the checkpoint gets the record, and it is let go of."""

    def fail(self, key: str, owner: str, error: str) -> None:
        """As `Queue.fail`; the checkpoint is let go of when the job is over."""


class LocalJobs:
    """The queue of this machine, and the pins of its jobs."""

    def __init__(self, queue: Queue, runs: Runs) -> None:
        self._queue, self._runs = queue, runs
        self._leased: dict[str, QueuedJob] = {}

    def lease(self, owner: str, *, seconds: float) -> QueuedJob | None:
        """As `Queue.lease`, at a place of the job whose checkpoint is there."""
        job = self._queue.lease(owner, seconds=seconds)
        if job is not None:
            job = self._leased[job.key] = settle(self._queue, self._runs, job)
        return job

    def renew(self, key: str, owner: str, *, seconds: float) -> bool:
        """As `Queue.renew`."""
        return self._queue.renew(key, owner, seconds=seconds)

    def finish(self, key: str, record: Mapping[str, Any]) -> bool:
        """As `JobSource.finish`."""
        stored = finish(self._queue, self._runs, key, record, leased=self._leased.pop(key, None))
        self._let_go(key)
        return stored

    def fail(self, key: str, owner: str, error: str) -> None:
        """As `JobSource.fail`."""
        self._queue.fail(key, owner, error)
        self._leased.pop(key, None)
        self._let_go(key)

    def _let_go(self, key: str) -> None:
        """Unpin the checkpoint of a job that is over; a run that went has nothing to keep."""
        job = self._queue.job(key)
        try:
            if job is not None:
                unpin_job(self._queue, self._runs.checkpoints(job.run), key)
        except PublicError:
            return


class _Heartbeat:
    """Renews a lease from a thread while the job runs; ends the job when that is refused or it is stuck."""

    def __init__(
        self, jobs: JobSource, key: str, owner: str, *, lease: float, limit: float, lost: Callable[[], None]
    ) -> None:
        self._jobs, self._key, self._owner = jobs, key, owner
        self._lease, self._limit, self._lost = lease, limit, lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        start = held = time.monotonic()
        while not self._stop.wait(min(self._lease / 3, BEAT_SECONDS, self._limit / 3)):
            now = time.monotonic()
            try:
                if now - start > self._limit:
                    reason = f"it took more than {self._limit:g} s (--job-timeout)"
                    self._jobs.fail(self._key, self._owner, reason)
                    break
                if not self._jobs.renew(self._key, self._owner, seconds=self._lease):
                    break
                held = now
            except Exception as error:
                # A full disk or a server that restarts: the lease lasts a while longer.
                _log.warning("the lease of %s was not renewed: %s", self._key, error)
                if now - held > self._lease:
                    break
        else:
            return
        self._lost()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Worker:
    """Scores job after job and keeps the last model, which the next job often scores too.

    Args:
        jobs: where they come from.
        runs: the run folders.
        owner: name of this worker in the queue; no other has it.
        lease_seconds: after which the job of a dead worker goes to another one.
        job_seconds: a job that takes longer is given back with that reason.
        lost: called from another thread when the job was taken away while it runs; it may end the process.
            Unless it does, the job runs on and its result is stored only if there is none.
    """

    def __init__(
        self,
        jobs: JobSource,
        runs: Runs,
        owner: str,
        *,
        lease_seconds: float = LEASE_SECONDS,
        job_seconds: float = JOB_SECONDS,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._jobs, self._runs, self._owner = jobs, runs, owner
        self._lease, self._limit, self._lost = lease_seconds, job_seconds, lost
        self._loaded: tuple[object, Subject] | None = None

    def once(self) -> bool:
        """Do one job; False when there was none. One that cannot be done is given back with its reason."""
        leased = self._jobs.lease(self._owner, seconds=self._lease)
        if leased is None:
            return False
        beat = _Heartbeat(
            self._jobs, leased.key, self._owner, lease=self._lease, limit=self._limit, lost=self._lost
        )
        try:
            with beat:
                record = self.score(leased)
            self._jobs.finish(leased.key, record)
        except Exception as error:
            # Whatever one checkpoint does to a task, the next job still gets its worker.
            _log.exception("%s of run %s, step %d failed", leased.task, leased.run, leased.step)
            # Clients read the reason, and other errors' texts may name folders of this machine.
            hidden = f"{type(error).__name__} while scoring run {leased.run}: the log of the service says why"
            reason = str(error) if isinstance(error, PublicError) else hidden
            self._jobs.fail(leased.key, self._owner, reason)
        return True

    def forever(self) -> None:
        """Work until the process is ended."""
        while True:
            if not self.once():
                time.sleep(POLL_SECONDS)

    def score(self, leased: QueuedJob) -> dict[str, Any]:
        """The record of a job: the stored one, or a new one. Raises what the task raises, and PublicError."""
        if leased.step == NO_STEP:
            return self._score_baseline(leased)
        run_dir, config = self._runs.folder(leased.run), self._runs.config(leased.run)
        steps = self._runs.steps(leased.run)
        if leased.step not in steps:
            raise PublicError(f"the checkpoint of step {leased.step} is gone")
        job = job_of(run_dir, steps[leased.step], get_task(leased.task), config)
        if job.key != leased.key:
            raise PublicError(CHANGED)
        record = stored_result(job)
        if record is None:
            return run_job(job, self._load(job, config), config, progress=False)
        log_scalars(job, record)
        return record

    def _score_baseline(self, leased: QueuedJob) -> dict[str, Any]:
        """The record of a model that is no run; its folder is only read."""
        baselines = self._runs.baseline(leased.run)
        if baselines is None:
            raise PublicError(f"there is no baseline {leased.run}")
        subject = self._model((leased.run, baselines.mark(leased.run)), lambda: baselines.load(leased.run))
        if baselines.key(subject, leased.task) != leased.key:
            raise PublicError(CHANGED)
        return score_subject(get_task(leased.task), subject, baselines.config, progress=False)

    def _load(self, job: Job, config: EvalConfig) -> LoadedRun:
        """The model of a job's checkpoint, loaded anew unless it is the last one."""
        wanted = (job.checkpoint, checkpoint_digest(job.checkpoint), digest(read_recipe(job.run_dir)))
        load = partial(load_run, job.run_dir, step=job.step, device=config.device)
        loaded = self._model(wanted, load)
        assert isinstance(loaded, LoadedRun), f"{wanted} names a run"
        return loaded

    def _model(self, wanted: object, load: Callable[[], Subject]) -> Subject:
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # two models need not fit
            self._loaded = (wanted, load())
        return self._loaded[1]


def work_once(queue: Queue, runs: Runs, owner: str, *, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Do one job of a queue on this machine, as `Worker.once`."""
    return Worker(LocalJobs(queue, runs), runs, owner, lease_seconds=lease_seconds).once()


def end_process() -> None:
    """End this process in the midst of its work: every file is written as a whole or not at all."""
    os._exit(LOST)
