"""What runs beside the answers: the search for checkpoints, and the workers' keeper."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from evals.pool import Pool
from evals.watch import Watcher

__all__ = ["Background"]

WATCH_SECONDS = 5.0
KEEP_SECONDS = 0.5
_log = logging.getLogger(__name__)


class Background:
    """Two threads for as long as the service runs: a slow file system does not keep a dead worker dead.

    Args:
        watcher: looks every ``seconds``.
        pool: its workers are kept alive, and ended on leaving.
        seconds: between two looks.
    """

    def __init__(self, watcher: Watcher, pool: Pool, *, seconds: float = WATCH_SECONDS) -> None:
        self._pool, self._stop = pool, threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(watcher.look, seconds), daemon=True),
            threading.Thread(target=self._repeat, args=(pool.keep_alive, KEEP_SECONDS), daemon=True),
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._pool.stop()

    def workers(self) -> int:
        """How many run."""
        return self._pool.alive()

    def _repeat(self, function: Callable[[], object], seconds: float) -> None:
        while True:
            try:
                function()
            except Exception:
                _log.exception("%s failed; trying again", function.__qualname__)
            if self._stop.wait(seconds):
                return
