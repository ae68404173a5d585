"""A run that is asked to end (SIGTERM, SIGUSR1): what that means before, between and after its training.

While a rank trains, the loop's own handler takes the signal, saves and ends with status 75. Everywhere else
it is taken here, so that the request never looks like a failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.failures import read_failures
from trellis_dist.training.job import EXIT_TERMINATED
from trellis_dist.training.termination import SIGNALS

__all__ = [
    "TerminatedError",
    "asked_to_end",
    "end_process",
    "end_rank_at_once",
    "ended",
    "handlers_kept",
    "newest_step",
    "on_termination",
]

# How long the main thread may take to hear of a signal; one that imports or computes hears at once.
MAIN_THREAD_S = 1.0


class TerminatedError(RuntimeError):
    """The run was asked to end and ended; starting it again resumes it."""


class _Asked(BaseException):
    """Raised in the launcher by a signal; not an Exception, so that no handler takes it for a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextlib.contextmanager
def handlers_kept(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Put back the handlers of ``numbers`` at the end: torchrun's agent leaves its own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets nobody else have handlers
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def asked_to_end(run_dir: Path | None = None) -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into a ``TerminatedError``; in a process that is a rank, end it at once.

    ``run_dir`` is left out before it is known.
    """
    before: int | None = None
    with handlers_kept(SIGNALS):
        try:
            if "RANK" in os.environ:
                end_rank_at_once(run_dir if os.environ["RANK"] == "0" else None)
            else:
                on_termination(_raise)
            before = newest_step(run_dir) if run_dir else None
            yield
        except _Asked as asked:
            raise ended(asked.name, run_dir, before=before) from None


def on_termination(handler: Callable[[int, FrameType | None], object]) -> None:
    """Let SIGTERM and SIGUSR1 call ``handler``; only the main thread can, another one changes nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


def _raise(number: int, _: FrameType | None) -> None:
    raise _Asked(signal.Signals(number).name)


def end_rank_at_once(run_dir: Path | None = None) -> None:
    """From now on, and whenever the loop does not listen, a request to end ends this rank with status 75.

    Not by an exception: clean-up would wait for peers, which the same signal ends. The loop's own handler
    stands before this one while it trains; the second signal, which does not want to wait for a save, comes
    here. With ``run_dir`` it is said on the terminal, for want of a launcher of ours that does; but not if a
    rank left a failure there, because then it is torchrun that ends the others.
    """
    on_termination(_EndAtOnce(run_dir))
    _listen_beside_the_main_thread()


class _EndAtOnce:
    """The handler of `end_rank_at_once`."""

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir

    def __call__(self, number: int, _: FrameType | None) -> None:
        if self._run_dir and not read_failures(self._run_dir):
            line = f"ended by {signal.Signals(number).name} at once, without a save"
            print(f"trellis: {line}; the same command continues from the newest checkpoint", file=sys.stderr)
        end_process(EXIT_TERMINATED)


def _listen_beside_the_main_thread() -> None:
    """Have a thread call the handler where the main thread does not.

    Python runs handlers when the main thread is back from C++. In the rendezvous, before ranks are
    connected, it waits there for a peer that the same signal may just have ended, and would not come back.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    replaced = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if replaced >= 0:  # one of ours, which listens as well, or another library's
        signal.set_wakeup_fd(replaced)
        os.close(reader)
        os.close(writer)
        return
    threading.Thread(target=_listen, args=(reader,), name="trellis-signals", daemon=True).start()


def _listen(reader: int) -> None:
    while number := os.read(reader, 1):
        before = signal.getsignal(number[0])
        time.sleep(MAIN_THREAD_S)
        handler = signal.getsignal(number[0])
        if handler is before and isinstance(handler, _EndAtOnce):
            handler(number[0], None)


def end_process(status: int) -> NoReturn:
    """End without a library's clean-up, in which a rank would wait for peers that wait for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, RuntimeError):  # gone, or in the middle of a write
            stream.flush()
    os._exit(status)


def newest_step(run_dir: Path) -> int:
    """The newest committed step of a run, not verified; 0 without one."""
    from checkpoints.commit import list_steps  # which imports torch: seconds, at a moment that may be short

    return next(iter(list_steps(run_dir / "checkpoints")), 0)


def ended(name: str, run_dir: Path | None, *, before: int | None) -> TerminatedError:
    """The line for a run that ``name`` ended.

    ``before`` is the newest step at the start; None for a signal before that.
    """
    newest = newest_step(run_dir) if run_dir else 0
    before = newest if before is None else before
    again = f"start {run_dir} again to resume it" if run_dir else "the same command continues"
    if newest > before:
        return TerminatedError(f"ended by {name} with step {newest} saved; {again}")
    found = f" from step {newest}" if newest else ""
    return TerminatedError(f"ended by {name}: nothing was trained and saved in this start; {again}{found}")
