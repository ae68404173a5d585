"""One job trains in a run folder at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from trellis_dist.files import make_directories

__all__ = ["RunLock"]

# A rank whose launcher was killed saves and ends by itself; a start that follows at once waits for that.
WAIT_S = 15.0
POLL_S = 0.2


class RunLock:
    """``RUN/.lock``, held by rank 0 and not by its launcher, because ranks can outlive one.

    It is an flock: the kernel drops it with the process that holds it, however that ends, so the file stays
    and is never stale.
    """

    def __init__(self, run_dir: Path) -> None:
        """Name the lock of ``run_dir``; ``take`` takes it, leaving the context releases it."""
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock, waiting up to ``WAIT_S`` seconds for a holder that is about to end.

        Raises:
            ValueError: another process keeps it.
            OSError: the folder is not writable.
        """
        make_directories(self._run_dir)
        self._file = (self._run_dir / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + WAIT_S
        if not self._free(self._file):
            _say(f"another process still trains {self._run_dir}: waiting up to {WAIT_S:.0f} s for it to end")
            while not self._free(self._file):
                if time.monotonic() > deadline:
                    holder = self._holder(self._file)
                    raise ValueError(f"another process trains {self._run_dir}: wait for it or end it{holder}")
                time.sleep(POLL_S)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _free(self, file: IO[str]) -> bool:
        """Take the lock if nobody holds it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems have no locks
            _say(f"alert: {self._run_dir} cannot be locked ({error.strerror}): start no second job there")
        return True

    def _holder(self, file: IO[str]) -> str:
        file.seek(0)
        name = file.read(200).strip()
        return f" ({name})" if name else ""

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
