"""How one run of `prepare` works: folders, workers, progress, clock; nothing here changes what is made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.workers import Workers

__all__ = ["Run"]


@dataclass
class Run:
    """One run.

    Attributes:
        directory: the data set.
        workers: who runs the tasks.
        threads: of the driver, which looks up and verifies committed units with them.
        progress: show bars and one line per decision on stderr.
        seconds: per stage, Ray's start left out.
    """

    directory: Path
    workers: Workers
    threads: int
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where units are committed."""
        return self.directory / "work"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside, without that of a Ray start that falls into it."""
        start, before = time.perf_counter(), self.workers.start_seconds
        yield
        spent = time.perf_counter() - start - (self.workers.start_seconds - before)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)
