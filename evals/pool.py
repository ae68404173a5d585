"""Keeping workers at work: the dead are replaced, the stuck are ended, and none outlives the server."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

from evals.baselines import Baselines
from evals.queue import Queue
from evals.worker import JOB_SECONDS, LEASE_SECONDS, LOST, LocalJobs, Worker, end_process

__all__ = ["Member", "Pool", "WorkerPool", "run_worker"]

# A worker that lived shorter died of itself, most likely: the next one waits.
QUICK_SECONDS = 10.0
MOST_WAIT = 30.0
_log = logging.getLogger(__name__)


class Member(Protocol):
    """One worker of a pool."""

    def alive(self) -> bool:
        """Whether it still works."""

    def kill(self) -> None:
        """End it, whatever it does."""

    def death(self) -> str | None:
        """Why it died; None where its job was taken away, which is no fault."""


class Pool(ABC):
    """Workers of one service. Only the thread that calls `keep_alive` may call `stop`, or after that ended.

    Args:
        queue: whose jobs they do; what a dead one held goes back to it.
        count: workers at a time.
        clock: seconds that only grow.
    """

    def __init__(self, queue: Queue, *, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._clock, self._started = queue, clock, 0
        self._members: list[tuple[str, Member, float] | None] = [None] * count
        self._waits, self._not_before = [0.0] * count, [0.0] * count

    @abstractmethod
    def _start(self, owner: str) -> Member:
        """A new worker under this name."""

    def keep_alive(self) -> None:
        """Start what is not running; end what holds a job and does not renew its lease."""
        overdue = self._queue.overdue()
        for place, entry in enumerate(self._members):
            if entry is not None:
                owner, member, since = entry
                if member.alive() and owner not in overdue:
                    continue
                self._bury(place, owner, member, self._clock() - since)
            if self._clock() >= self._not_before[place]:
                self._started += 1
                owner = f"{socket.gethostname()}/{os.getpid()}/{self._started}"
                self._members[place] = (owner, self._start(owner), self._clock())

    def _bury(self, place: int, owner: str, member: Member, lived: float) -> None:
        stuck = member.alive()
        member.kill()
        reason = "its worker did not renew the lease and was ended" if stuck else member.death()
        if reason is not None:
            _log.warning("%s: %s", owner, reason)
        self._queue.release(owner, reason or "it was taken away from its worker")
        again = reason is not None and lived < QUICK_SECONDS
        self._waits[place] = min(max(2 * self._waits[place], 0.5), MOST_WAIT) if again else 0.0
        self._not_before[place] = self._clock() + self._waits[place]
        self._members[place] = None

    def alive(self) -> int:
        """Workers that run."""
        return sum(entry is not None and entry[1].alive() for entry in self._members)

    def stop(self) -> None:
        """End all workers; their jobs wait again."""
        for place, entry in enumerate(self._members):
            if entry is not None:
                entry[1].kill()
                self._queue.hand_back(entry[0])
                self._members[place] = None


class _Process:
    """A worker process."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # no thread or lock of the server is copied
        self.process = context.Process(target=run_worker, args=arguments, daemon=True)
        self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def death(self) -> str | None:
        code = self.process.exitcode
        return None if code == LOST else f"its worker died (exit status {code})"


class WorkerPool(Pool):
    """Worker processes on this machine.

    Args:
        queue, count: as in `Pool`.
        roots, baselines: as in `evals.folders.Runs`.
        lease_seconds, job_seconds: as in `Worker`.
    """

    def __init__(
        self,
        queue: Queue,
        roots: tuple[Path, ...],
        *,
        count: int,
        baselines: Baselines | None = None,
        lease_seconds: float = LEASE_SECONDS,
        job_seconds: float = JOB_SECONDS,
    ) -> None:
        super().__init__(queue, count=count)
        self._arguments = (queue.database.path, roots, baselines, lease_seconds, job_seconds)

    def _start(self, owner: str) -> Member:
        return _Process((owner, *self._arguments))

    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        members = [entry[1] for entry in self._members if entry is not None]
        found = [m.process.pid for m in members if isinstance(m, _Process) and m.alive()]
        return [pid for pid in found if pid is not None]


def run_worker(
    owner: str,
    database: Path,
    roots: tuple[Path, ...],
    baselines: Baselines | None,
    lease_seconds: float,
    job_seconds: float,
) -> None:
    """What a worker process runs, until it or the server ends."""
    from evals.folders import Runs

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server stops its workers itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    queue, runs = Queue(database), Runs(*roots, baselines=baselines)
    worker = Worker(
        LocalJobs(queue, runs),
        runs,
        owner,
        lease_seconds=lease_seconds,
        job_seconds=job_seconds,
        lost=end_process,
    )
    worker.forever()


def _end_with_parent() -> None:
    """Wait for the end of the pipe that the parent holds: its death, SIGKILL included, ends this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a process of a pool"
    wait([parent.sentinel])
    end_process()
