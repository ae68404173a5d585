"""How much memory each process below this one holds at most, by what it is."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from types import TracebackType

import psutil

from benchmarks.data.kills import TASKS

__all__ = ["PeakMemory"]

INTERVAL = 0.1


class PeakMemory:
    """Samples resident memory (memory-mapped pages included) every 0.1 s while it is entered.

    Attributes:
        peaks: name of the process -> bytes of the largest of that name: "driver" (this process), a worker's
            task ("ray::clean_unit"), or the program ("raylet").
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(INTERVAL):
            self._note("driver", own)
            for child in own.children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    title = child.cmdline()[0]
                    self._note(title if title.startswith("ray::") else child.name(), child)

    def _note(self, name: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            self.peaks[name] = max(self.peaks[name], process.memory_info().rss)

    def in_mib(self) -> dict[str, int]:
        """`peaks` in MiB, the largest first."""
        found = sorted(self.peaks.items(), key=lambda item: -item[1])
        return {name: round(size / 2**20) for name, size in found}

    def of_tasks(self) -> int:
        """MiB of the largest worker while it ran a task of ours."""
        return round(max(self.peaks.get(f"ray::{task}", 0) for task in TASKS) / 2**20)
