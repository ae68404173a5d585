"""A `trellis` command as a child process that can be asked to save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launch.ranks import CHECKOUT
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["CutError", "FailedError", "Slice", "run_command"]

POLL_S = 0.2
# How the command line begins the line that says what went wrong.
PREFIX_ERROR = "trellis: error: "
# What a child that was asked to end may take beyond its own grace period before it is killed.
PATIENCE_S = 120.0
# Of a rank or a launcher around us, which would make the child take part in that one's job.
_NOT_PASSED_ON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class CutError(RuntimeError):
    """The slice is over, or somebody asked us to end; what was done is saved, and the next call goes on."""


class FailedError(RuntimeError):
    """A child failed; the message is its error line."""


class Slice:
    """How long runs may go on: until a deadline, or until somebody asks them to end."""

    def __init__(self, minutes: float | None = None) -> None:
        """``minutes`` from now on; None for ever."""
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._asked = threading.Event()

    def end(self) -> None:
        """Ask all runs of the slice to save and end."""
        self._asked.set()

    @property
    def asked(self) -> bool:
        """Whether `end` was called."""
        return self._asked.is_set()

    @property
    def over(self) -> bool:
        """Whether nothing new may begin and what runs should end."""
        return self.asked or (self._deadline is not None and time.monotonic() >= self._deadline)


def run_command(arguments: Sequence[str], *, log: Path, slice_: Slice, threads: int) -> None:
    """Run ``trellis ARGUMENTS`` in a session of its own, output appended to ``log``, until done or cut.

    Raises:
        CutError: the slice was over; the child was asked to end (SIGTERM) and ended.
        FailedError: it failed.
    """
    if slice_.over:
        raise CutError("the slice is over")
    with log.open("ab") as output:
        start = output.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C comes to us alone, and we ask once: a second time means no save
        )
        status, cut = _wait(child, slice_)
    if status == 0:
        return
    if cut or status == EXIT_TERMINATED:
        raise CutError("the slice is over" if cut else "somebody ended it")
    raise FailedError(_error_in(log, start, status))


def _environment(threads: int) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED_ON}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), kept.get("PYTHONPATH", "")]))
    return kept | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def _wait(child: subprocess.Popen[bytes], slice_: Slice) -> tuple[int, bool]:
    """Exit status, and whether it was asked to end."""
    try:
        while (status := child.poll()) is None and not slice_.over:
            time.sleep(POLL_S)
    except BaseException:
        _end(child)
        raise
    return (status, False) if status is not None else (_end(child), True)


def _end(child: subprocess.Popen[bytes]) -> int:
    child.send_signal(signal.SIGTERM)
    try:
        return child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


def _error_in(log: Path, start: int, status: int) -> str:
    """The error lines that the command printed, or where to look."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    errors = [line.removeprefix(PREFIX_ERROR) for line in lines if line.startswith(PREFIX_ERROR)]
    return "; ".join(errors) or f"ended with status {status}; its output is in {log}"
