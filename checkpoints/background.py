"""Saves that training does not wait for: a snapshot, a thread that writes, a commit once all are durable.

    this rank's thread   snapshot -> write -> DONE
    rank 0's thread      ... -> wait for every rank's description -> manifest, commit -> DONE -> `afterwards`

A rank that fails says FAILED, and nothing is committed. The ranks compare their statuses wherever they meet
anyhow (once a step) and `settle` what all of them know; the threads themselves only touch files, so that no
collective ever runs beside those of training.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.commit import attempt_name
from checkpoints.logical import LogicalTensor
from checkpoints.save import RankSave, SaveError
from checkpoints.snapshot import HostBuffers, Snapshot
from trellis_dist.files import REAL, FileSystem

__all__ = ["BackgroundSaver", "Settled", "Status"]

POLL_S = 0.02
DROP_S = 10.0  # how long other ranks may take to stop writing into an attempt that has failed


class Status(enum.IntEnum):
    """Where a rank's share of the save in flight is; of rank 0, DONE means committed."""

    IDLE = 0
    WORKING = 1
    DONE = 2
    FAILED = 3


@dataclass(frozen=True)
class Settled:
    """How a save ended, the same on every rank but for `error` and the measurements.

    Attributes:
        step: the step that was saved, or not.
        failed: ranks that failed; none when the step is committed.
        error: what failed here, chained to its cause; None where nothing did.
        seconds: from the start to the end of this rank's share.
        size: bytes of tensors this rank wrote.
    """

    step: int
    failed: tuple[int, ...]
    error: SaveError | None
    seconds: float
    size: int


class _CancelledError(Exception):
    """Another rank failed: what this one writes is for nothing."""


class BackgroundSaver:
    """Saves of one rank, one at a time. All methods are called by the thread that trains."""

    def __init__(
        self,
        root: Path,
        *,
        rank: int,
        world_size: int,
        name: Callable[[int], str] | None = None,
        afterwards: Callable[[Path], None] | None = None,
        file_system: FileSystem = REAL,
    ) -> None:
        """Save into ``root``.

        Args:
            root: folder of the run's checkpoints, shared by all ranks.
            rank, world_size: this rank and how many there are.
            name: the name rank 0 gives its attempt at a step, as every rank must know it; one rank alone may
                leave it out.
            afterwards: called in rank 0's thread with what was committed.
            file_system: replaced by tests.
        """
        assert name is not None or world_size == 1, "ranks must know the name of rank 0's attempts"
        self._root, self._rank, self._world = Path(root), rank, world_size
        self._name = name or (lambda step: attempt_name(step, number=0))
        self._afterwards, self._file_system = afterwards, file_system
        self._buffers = HostBuffers()
        self._flight: _Flight | None = None
        self._last: _Flight | None = None

    @property
    def status(self) -> Status:
        """This rank's share of the save in flight; IDLE without one."""
        return self._flight.status if self._flight else Status.IDLE

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved, or None."""
        return self._flight.save.step if self._flight else None

    @property
    def buffer_bytes(self) -> int:
        """Host memory that snapshots take."""
        return self._buffers.size

    def start(
        self,
        step: int,
        tensors: Sequence[LogicalTensor],
        run_state: Mapping[str, Any],
        *,
        copy: bool = True,
    ) -> None:
        """Begin to save ``step``; the values of ``tensors`` must not change before ``wait_copied`` returns.

        Without ``copy`` no memory is taken for a snapshot, and they must not change before it is settled. A
        save that is in flight must be settled first, on all ranks.
        """
        assert self._flight is None, f"step {step}: the save of step {self.in_flight} is still in flight"
        save = RankSave(
            self._root, step, rank=self._rank, world_size=self._world, file_system=self._file_system
        )
        before, name = self._last, self._name(step)
        if before is not None and copy:
            before.snapshot.wait()  # one that failed elsewhere may still be copying into the same buffers
        snapshot = Snapshot(tensors, self._buffers if copy else None)
        thread = before.thread if before is not None else None
        self._flight = _Flight(save, snapshot, run_state, name, before=thread, afterwards=self._afterwards)
        self._last = self._flight
        self._last.thread.start()

    def wait_copied(self) -> None:
        """Return once weights and optimizer state may change."""
        if self._flight is not None:
            self._flight.snapshot.wait()

    def wait(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for this rank's share to end."""
        if self._flight is not None:
            self._flight.ended.wait(timeout)

    def settle(self, statuses: Sequence[int]) -> Settled | None:
        """Close the save in flight if all ranks are done, or one has failed; None while it goes on.

        Args:
            statuses: `status` of every rank, by rank, as all of them said at the same moment.
        """
        flight = self._flight
        if flight is None:
            return None
        failed = tuple(rank for rank, status in enumerate(statuses) if status == Status.FAILED)
        if not failed and any(status != Status.DONE for status in statuses):
            return None
        if failed:
            flight.cancelled.set()  # its thread ends when it can; the next save waits for that, not training
        self._flight = None
        return flight.result(failed)

    def rest(self, timeout: float | None = None) -> None:
        """Wait (up to ``timeout`` seconds) until the last save's thread has ended, `afterwards` included."""
        if self._last is not None:
            self._last.thread.join(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Cancel a save in flight, whose attempt is removed, and ``rest``."""
        if self._flight is not None:
            self._flight.cancelled.set()
            self._flight = None
        self.rest(timeout)


class _Flight:
    """One save in flight on one rank."""

    def __init__(
        self,
        save: RankSave,
        snapshot: Snapshot,
        run_state: Mapping[str, Any],
        name: str,
        *,
        before: threading.Thread | None,
        afterwards: Callable[[Path], None] | None,
    ) -> None:
        self.save, self.snapshot = save, snapshot
        self._run_state, self._name, self._before, self._afterwards = run_state, name, before, afterwards
        self._attempt = save.root / name
        self.status, self.ended, self.cancelled = Status.WORKING, threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._began, self._seconds, self._size = time.monotonic(), 0.0, 0
        # A daemon: a process that ends on an error must not wait for ranks that write no more.
        self.thread = threading.Thread(target=self._run, name=f"checkpoint-{save.step}", daemon=True)

    def _run(self) -> None:
        try:
            slices = self.snapshot.finish(self._proceed)
            if self._before is not None:
                self._before.join()  # old checkpoints may still be being removed
            self._make_attempt()
            self._size = self.save.write(self._attempt, slices, self._run_state, proceed=self._proceed)
            committed = self._commit() if self.save.rank == 0 else None
        except BaseException as error:  # a writer that dies silently would leave its ranks waiting
            self._end(Status.FAILED, error)
            if self.save.rank == 0:
                self.cancelled.wait()  # until all ranks know: none of them writes any more
                self.save.drop(self._attempt, patience=DROP_S)
            return
        self._end(Status.DONE, None)
        if committed is not None and self._afterwards is not None:
            self._afterwards(committed)

    def _end(self, status: Status, error: BaseException | None) -> None:
        self._seconds, self._error, self.status = time.monotonic() - self._began, error, status
        self.ended.set()

    def _proceed(self) -> None:
        if self.cancelled.is_set():
            raise _CancelledError

    def _make_attempt(self) -> None:
        if self.save.rank == 0:
            self.save.begin(self._name)
        while not self._attempt.is_dir():
            self._pause()

    def _commit(self) -> Path:
        while not self.save.ready(self._attempt):
            self._pause()
        return self.save.commit(self._attempt)

    def _pause(self) -> None:
        self._proceed()
        self.cancelled.wait(POLL_S)

    def result(self, failed: tuple[int, ...]) -> Settled:
        error = None
        if self.save.rank in failed:
            text = (
                f"checkpoint of step {self.save.step} not saved (rank {self.save.rank}: {self._error}); "
                "earlier ones are intact"
            )
            error = SaveError(text)
            error.__cause__ = self._error
        return Settled(self.save.step, failed, error, self._seconds, self._size)
