"""A worker: leases a job, renews the lease while it runs, stores the result. Any number may share a queue."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from evals.evaluate import job_of, run_job, stored_result
from evals.pins import unpin_job
from evals.queue import Queue, QueuedJob
from evals.runs import load_run
from evals.tasks.registry import get_task
from evals.watch import PublicError, Runs

__all__ = ["WorkerPool", "run_worker", "work_once"]

LEASE_SECONDS = 60.0
POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)


class _Heartbeat:
    """Renews a lease from a thread while the job runs."""

    def __init__(self, queue: Queue, key: str, owner: str, seconds: float) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(queue, key, owner, seconds), daemon=True)

    def _beat(self, queue: Queue, key: str, owner: str, seconds: float) -> None:
        while not self._stop.wait(seconds / 3):
            if not queue.renew(key, owner, seconds=seconds):
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def work_once(queue: Queue, runs: Runs, owner: str, *, lease_seconds: float = LEASE_SECONDS) -> bool:
    """Do one job; False when the queue had none. A job that cannot be done is given back with its reason."""
    leased = queue.lease(owner, seconds=lease_seconds)
    if leased is None:
        return False
    try:
        with _Heartbeat(queue, leased.key, owner, lease_seconds):
            record = _score(leased, runs)
        queue.finish(leased.key, record)
    except Exception as error:
        # Whatever one checkpoint does to a task, the next job still gets its worker.
        _log.exception("%s of run %s, step %d failed", leased.task, leased.run, leased.step)
        # Clients read the reason, and other errors' texts may name folders of this machine.
        hidden = f"{type(error).__name__} while scoring run {leased.run}: the log of the service says why"
        queue.fail(leased.key, owner, str(error) if isinstance(error, PublicError) else hidden)
    _let_go(queue, runs, leased)
    return True


def _let_go(queue: Queue, runs: Runs, leased: QueuedJob) -> None:
    """Unpin the checkpoint of a job that is over; a run that went has nothing to keep."""
    try:
        unpin_job(queue, runs.checkpoints(leased.run), leased.key)
    except PublicError:
        return


def _score(leased: QueuedJob, runs: Runs) -> dict[str, Any]:
    run_dir, config = runs.folder(leased.run), runs.config(leased.run)
    steps = runs.steps(leased.run)
    if leased.step not in steps:
        raise PublicError(f"the checkpoint of step {leased.step} is gone")
    job = job_of(run_dir, steps[leased.step], get_task(leased.task), config)
    if job.key != leased.key:
        raise PublicError("the run, its recipe or its data changed since the job was queued: submit it again")
    record = stored_result(job)
    if record is None:
        loaded = load_run(run_dir, step=leased.step, device=config.device)
        record = run_job(job, loaded, config, progress=False)
    return record


def run_worker(database: Path, root: Path, lease_seconds: float = LEASE_SECONDS) -> None:
    """Work until the process is ended."""
    queue, runs = Queue(database), Runs(root)
    owner = f"{socket.gethostname()}/{os.getpid()}"
    while True:
        if not work_once(queue, runs, owner, lease_seconds=lease_seconds):
            time.sleep(POLL_SECONDS)


class WorkerPool:
    """Worker processes of one service; a dead one is replaced, its job comes back when its lease runs out."""

    def __init__(
        self, database: Path, root: Path, *, count: int, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._arguments = (database, root, lease_seconds)
        self._processes: list[BaseProcess | None] = [None] * count

    def keep_alive(self) -> None:
        """Start what is not running."""
        context = multiprocessing.get_context("spawn")
        for place, process in enumerate(self._processes):
            if process is None or not process.is_alive():
                process = context.Process(target=run_worker, args=self._arguments, daemon=True)
                process.start()
                self._processes[place] = process

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [p.pid for p in self._processes if p is not None and p.is_alive() and p.pid is not None]

    def stop(self) -> None:
        """End all workers."""
        for process in self._processes:
            if process is not None:
                process.terminate()
                process.join()
