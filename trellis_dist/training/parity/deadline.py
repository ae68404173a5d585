"""A case that hangs ends the process with its name and the stacks; it does not wait in silence."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

from trellis_dist.parallel import env

__all__ = ["AFTER_ERROR_S", "Deadline"]

# Python can hold its lock inside a library for ever: after this many seconds more C code prints and exits.
_GRACE_S = 20.0
_STDERR = 2
# After an error on one rank the others fail too, or finish, or hang because of it.
AFTER_ERROR_S = 60.0

OnExpiry = Callable[[str, str], None]


class Deadline:
    """Ends this process when what runs ``within`` it outlives its time.

    Args:
        seconds: for each thing that runs.
        on_expiry: called with one line and the stacks before the process exits with status 1.

    Attributes:
        what: runs now, or ran last.
    """

    def __init__(self, seconds: float, on_expiry: OnExpiry | None = None) -> None:
        self._seconds, self._on_expiry = seconds, on_expiry
        self.what = ""
        self._said, self._remedy, self._limit = "", "", seconds
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def within(self, what: str, *, seconds: float | None = None, remedy: str = "") -> Iterator[None]:
        """Start the clock for ``what`` and stop it at the end.

        Args:
            what: how the line begins that says it hung.
            seconds: other than for most things.
            remedy: how that line ends; it is then printed without stacks, which would only hide it.
        """
        self.what, self._said, self._remedy = what, "", remedy
        self._limit = self._seconds if seconds is None else seconds
        self._start(self._limit)
        try:
            yield
        finally:
            self._stop()

    def note(self, error: BaseException) -> None:
        """Remember why this rank waits for the others, perhaps in vain: they get less time from here on."""
        text = str(error).strip() or repr(error)
        self._said = f"{type(error).__name__}: {text.splitlines()[0]}"
        self._stop()
        self._start(min(self._limit, AFTER_ERROR_S))

    def _start(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(seconds + _GRACE_S, exit=True, file=_STDERR)

    def _stop(self) -> None:
        assert self._timer is not None, "the clock is stopped where it was started"
        faulthandler.cancel_dump_traceback_later()
        self._timer.cancel()

    def _expire(self) -> None:
        where = f"rank {env.rank()} on {socket.gethostname()}"
        if self._said:
            line = f"{self.what}: {where} raised {self._said}; other ranks did not get as far and hang"
        else:
            line = f"{self.what}: {where} did not finish in {self._limit:g} s{self._remedy}"
        stacks = _stacks()
        shown = line if self._remedy else f"{line}\n{stacks}"
        os.write(_STDERR, f"{shown}\n".encode())  # not through a stream whose lock a hung thread holds
        if self._on_expiry is not None:
            self._on_expiry(line, stacks)
        os._exit(1)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
