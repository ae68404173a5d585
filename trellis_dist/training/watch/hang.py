"""Ends a run that no longer gets anywhere, and says who held it up.

    main thread: arm(600, step=12, operation="update") ... enter("backward pass") ... arm(...) ... disarm()
    watch thread: deadline passed -> stacks -> read all beats, twice -> blame -> report -> exit status 1

The first rank whose deadline passes judges; the others find its verdict with their next beat, write their
stacks and end too, whatever they are doing. Python threads run while the main thread waits in a collective;
for one that holds the interpreter's lock there is faulthandler's timer, in C, a few seconds behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trellis_dist.training.errors import CUT_OFF, SILENT_STORE
from trellis_dist.training.watch.blame import Verdict, blame
from trellis_dist.training.watch.flight import dump_flight, flight_path, group_members, write_flight
from trellis_dist.training.watch.heartbeat import Heartbeat
from trellis_dist.training.watch.links import has_link, is_own_address, job_link
from trellis_dist.training.watch.status_page import StatusPage

__all__ = ["HangWatch"]

READ_LIMIT_S = 0.8  # for one question to the store, whose host may be what hangs
BEATS_APART = 2.2  # between the two readings
GRACE_S = 8.0  # what judging may take before the C timer ends the process; and what comes after it
FILES_LIMIT_S = 2.5  # for the report, and for the flight record: the file system may be what hangs


@dataclass(frozen=True)
class Phase:
    """What the main thread does, and until when (monotonic seconds; None: no limit)."""

    step: int
    operation: str
    seconds: float
    deadline: float | None


class HangWatch:
    """A deadline for each phase of this rank; ``heartbeat`` connects it to the others, where it has any."""

    def __init__(
        self,
        *,
        rank: int,
        report: Callable[[str, bool], None],
        heartbeat: Heartbeat | None = None,
        page: StatusPage | None = None,
        store_rank: int | None = None,
        speaks: bool | None = None,
        logs: Path | None = None,
        poll_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """Start the watch thread, with no deadline yet.

        Args:
            report: called once with (message, echo) before the process ends; ``echo`` is True on ranks that
                repeat what another one reports. It must not wait long: ``GRACE_S`` bounds all that is done.
            page: also told what this rank does.
            store_rank: the rank whose process keeps the job's store, to be named when the store is silent;
                None when another process does (torchrun's agent).
            speaks: whether this rank says what it knows when the store is silent and ranks cannot choose one
                of them; unless given, the first rank that does not keep the store.
            logs: where the record of this rank's last collectives is left; nowhere without.
            end: ends the process with a status.
        """
        self._rank, self._report, self._heartbeat, self._page = rank, report, heartbeat, page
        self._store_rank, self._poll_s, self._clock, self._end = store_rank, poll_s, clock, end
        self._logs = logs
        self._speaks = rank == (1 if store_rank == 0 else 0) if speaks is None else speaks
        self._link = job_link()
        self._store_is_here = is_own_address(os.environ.get("MASTER_ADDR", ""))
        self._stuck: list[int] = []  # silent processes of this job on this machine
        self._apart = False  # all ranks to blame are on other machines
        self._phase = Phase(0, "start", 0.0, None)
        self._backstop = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trellis-watch", daemon=True)
        self._thread.start()

    def arm(self, seconds: float, *, step: int, operation: str) -> None:
        """Begin a phase that must be over after ``seconds`` (0: no limit)."""
        deadline = self._clock() + seconds if seconds > 0 else None
        self._phase = Phase(step, operation, seconds, deadline)
        self._tell()
        self._set_backstop(seconds + GRACE_S if seconds > 0 else 0.0)

    def enter(self, operation: str) -> None:
        """Name the next operation of the phase; its deadline stays."""
        now = self._phase
        self._phase = Phase(now.step, operation, now.seconds, now.deadline)
        self._tell()

    def disarm(self) -> None:
        """Stop the clock."""
        now = self._phase
        self._phase = Phase(now.step, now.operation, 0.0, None)
        self._set_backstop(0.0)

    def close(self) -> None:
        """Stop watching, and the beats and the page with it; may be called twice."""
        self.disarm()
        self._stop.set()
        self._thread.join(2 * self._poll_s)
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self._page is not None:
            self._page.close()

    def _tell(self) -> None:
        step, operation = self._phase.step, self._phase.operation
        if self._heartbeat is not None:
            self._heartbeat.note(step, operation)
        if self._page is not None:
            self._page.write(step=step, operation=operation)

    def _set_backstop(self, seconds: float) -> None:
        if self._backstop:
            faulthandler.cancel_dump_traceback_later()
        self._backstop = seconds > 0
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True, file=_log())

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            phase, found = self._phase, self._heartbeat.verdict if self._heartbeat else None
            if found is not None:
                self._write_stacks(f"{phase.operation} of step {phase.step}")
                return self._leave(found, echo=True, flight=self._keep_flight(phase))
            if phase.deadline is not None and self._clock() >= phase.deadline:
                return self._overdue(phase)
        return None

    def _overdue(self, phase: Phase) -> None:
        what = f"step {phase.step}, {phase.operation}: more than {phase.seconds:g} s"
        self._write_stacks(what)
        flight = self._keep_flight(phase)
        try:
            message, echo = self._judge(what)
        except Exception as error:  # a hang must be reported whatever becomes of the search for its cause
            message, echo = f"no progress on rank {self._rank} ({what}); no cause found: {error!r}", False
        self._leave(message, echo=echo, flight=flight)

    def _judge(self, what: str) -> tuple[str, bool]:
        """The message, and whether another rank gives it."""
        beat, here = self._heartbeat, f"no progress on rank {self._rank} ({what})"
        if beat is None:
            return here, False
        first = beat.claim(READ_LIMIT_S)
        if first is False:
            found = self._verdict_of_another(beat)
            if found is not None:
                return found, True
        verdict = self._blame(beat) if first is not None else None
        if verdict is None:
            cut = "" if self._store_is_here else self._own_link()
            return f"{here}: {cut or self._silent_store()}", not self._speaks
        # A store on another host has just answered, so there is a network; one on this host proves nothing.
        if self._store_is_here and self._apart and (cut := self._own_link()):
            return f"{here}: {cut}", False
        message = f"{here}: {verdict.message}"
        beat.publish(message, READ_LIMIT_S)
        return message, False

    def _own_link(self) -> str:
        """That this host has lost its network, if it has: then the others are not to blame."""
        if self._link is None or has_link(self._link):
            return ""
        return f"{CUT_OFF} {socket.gethostname()} itself is cut off: {self._link} has no link"

    def _verdict_of_another(self, beat: Heartbeat) -> str | None:
        """Wait for it as long as judging takes; the last beat may have been just before it."""
        until = time.monotonic() + BEATS_APART * beat.interval_s + READ_LIMIT_S
        while beat.verdict is None and time.monotonic() < until:
            time.sleep(self._poll_s)
        return beat.verdict or beat.look(READ_LIMIT_S)

    def _blame(self, beat: Heartbeat) -> Verdict | None:
        """Read all beats twice; None when the store does not answer."""
        before = beat.read(READ_LIMIT_S)
        if before is None:
            return None
        time.sleep(BEATS_APART * beat.interval_s)
        after = beat.read(READ_LIMIT_S)
        if after is None:
            return None
        verdict = blame(before, after, now=time.time(), members=group_members())
        here = socket.gethostname()
        self._stuck = [
            found.pid for rank in verdict.silent if (found := after[rank]) is not None and found.host == here
        ]
        hosts = [found.host if (found := after[rank]) is not None else None for rank in verdict.ranks]
        self._apart = bool(hosts) and here not in hosts
        return verdict

    def _silent_store(self) -> str:
        place, here = os.environ.get("MASTER_ADDR"), socket.gethostname()
        silent = f"{SILENT_STORE} on {place}" if place else SILENT_STORE
        if self._store_rank is None:
            return f"{silent} does not answer: its host is down, stopped or cannot be reached from {here}"
        return (
            f"{silent} does not answer: rank {self._store_rank}, which keeps it, is stopped or gone, or "
            f"{here} is cut off from it"
        )

    def _leave(self, message: str, *, echo: bool, flight: _Beside | None) -> None:
        """Report and end; the other ranks get time to see the verdict first."""
        self._set_backstop(GRACE_S)
        error = _Beside(lambda: self._report(message, echo)).failure()
        if error is not None:
            print(f"the hang could not be recorded ({error}): {message}", file=_log(), flush=True)
        if flight is not None and (error := flight.failure()) is not None:
            print(f"rank {self._rank}: no flight record: {error}", file=_log(), flush=True)
        if self._heartbeat is not None and not echo:
            time.sleep(1.5 * self._heartbeat.interval_s)
        for process in self._stuck:
            # A stopped process hears no other signal, and a launcher would wait half a minute to find out.
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        self._end(1)

    def _write_stacks(self, what: str) -> None:
        print(f"rank {self._rank}: {what}; stacks of all threads:", file=_log(), flush=True)
        faulthandler.dump_traceback(file=_log(), all_threads=True)

    def _keep_flight(self, phase: Phase) -> _Beside | None:
        """Note the collectives this rank entered last, which tell where the ranks went apart; file them."""
        if self._logs is None:
            return None
        path = flight_path(self._logs, step=phase.step, rank=self._rank)
        try:
            flight = dump_flight(rank=self._rank, operation=phase.operation)
        except Exception as error:  # a hang must be reported whatever becomes of its records
            print(f"rank {self._rank}: no flight record: {error}", file=_log(), flush=True)
            return None

        def write() -> None:
            if flight:
                write_flight(path, flight)
                print(f"rank {self._rank}: its last collectives are in {path}", file=_log(), flush=True)

        return _Beside(write)


class _Beside(threading.Thread):
    """Work on files in a thread of its own: the file system may be what hangs, and ranks want a verdict."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="trellis-files", daemon=True)
        self._work = work
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error

    def failure(self) -> Exception | None:
        """What went wrong, which may be that ``FILES_LIMIT_S`` more were not enough."""
        self.join(FILES_LIMIT_S)
        return TimeoutError(f"not done within {FILES_LIMIT_S:g} s") if self.is_alive() else self._error


def _log() -> TextIO:
    return sys.__stderr__ or sys.stderr
