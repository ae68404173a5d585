"""RUN/starts.jsonl: every start of a run, how far it came, and what was done twice because of it.

One JSON object per line and start. The line of the start at work is rewritten in place after every step: it
has one length, so that neither a kill nor a full disk can damage what stands before it, and a machine that
goes down costs at most the last seconds of one line. Times are unix seconds, because a run may be continued
on another machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["StartRecord", "Starts", "read_starts", "useful_seconds"]

NAME = "starts.jsonl"
LINE = 512  # bytes, the newline included
LONGEST_HOST = 64
KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


@dataclasses.dataclass(kw_only=True)
class StartRecord:
    """One start.

    Attributes:
        start: 1 for the first of the run.
        time: unix seconds at which it began; ``last`` when it last did something.
        host, world_size: of rank 0, and how many ranks.
        resumed_step: where it began.
        from_step: the lowest step it went back to; ``resumed_step`` but for a rollback to before it.
        step: the last one it did.
        seconds: of its steps that count, without validation, saves and what a rollback undid.
        lost_steps: done before, by this start or an earlier one, and to be done again in this one.
        outcome: "finished", "stopped", "terminated", "failed" (an error in training); "" while it works, and
            for ever after a kill or a hang.
    """

    start: int
    time: float
    last: float
    host: str
    world_size: int
    resumed_step: int
    from_step: int
    step: int
    seconds: float = 0.0
    lost_steps: int = 0
    outcome: str = ""


def read_starts(run_dir: Path) -> list[StartRecord]:
    """The starts of a run, the first first; a line that cannot be read is left out."""
    path = Path(run_dir) / NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> StartRecord | None:
    """What a line says; None for one that was cut short by a crash, or is another version's."""
    try:
        values = json.loads(line)
        fields = {field.name: str(field.type) for field in dataclasses.fields(StartRecord)}
        record = StartRecord(**{name: value for name, value in values.items() if name in fields})
    except (ValueError, TypeError, AttributeError):
        return None
    sound = all(isinstance(getattr(record, name), KINDS[kind]) for name, kind in fields.items())
    return record if sound else None


def _known_starts(run_dir: Path) -> list[StartRecord]:
    try:
        return read_starts(run_dir)
    except OSError:
        return []


def useful_seconds(records: Iterable[StartRecord]) -> float:
    """Seconds of the steps that were not done again later.

    Of a start that went further than the next one began, the share of its steps that was kept counts.
    """
    parts: list[tuple[int, int, float]] = []  # from step, to step, seconds
    for record in records:
        parts = [_cut(part, record.from_step) for part in parts]
        parts.append((record.from_step, record.step, record.seconds))
    return sum(seconds for _, _, seconds in parts)


def _cut(part: tuple[int, int, float], end: int) -> tuple[int, int, float]:
    first, last, seconds = part
    if last <= end:
        return part
    kept = max(0, end - first)
    share = kept / (last - first) if last > first else 0.0  # a start that did no step has nothing to keep
    return first, first + kept, seconds * share


class Starts:
    """The starts of a run and the one at work; on other ranks than 0 it writes and tells nothing.

    A file system that refuses ends no run: the numbers then stay in memory.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        main: bool,
        resumed_step: int,
        world_size: int,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin a start at ``resumed_step``; ``began`` is its unix time, now unless given."""
        self._main, self._clock, self._file = main, clock, -1
        self._path = Path(run_dir) / NAME
        self._earlier = _known_starts(run_dir) if main else []
        reached = self._earlier[-1].step if self._earlier else 0
        began = clock() if began is None else began
        self.record = StartRecord(
            start=len(self._earlier) + 1,
            time=began,
            last=began,
            host=socket.gethostname()[:LONGEST_HOST],
            world_size=world_size,
            resumed_step=resumed_step,
            from_step=resumed_step,
            step=resumed_step,
            lost_steps=max(0, reached - resumed_step),
        )
        if main:
            try:
                self._open()
            except OSError:  # what is half there must not be gone on with
                if self._file >= 0:
                    os.close(self._file)
                self._file = -1

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._offset = os.fstat(self._file).st_size
        if self._offset and os.pread(self._file, 1, self._offset - 1) != b"\n":
            os.pwrite(self._file, b"\n", self._offset)  # the line before was cut short
            self._offset += 1
        self._write()
        os.fsync(self._file)

    def _write(self) -> None:
        """Rewrite the line of this start."""
        self.record.last = round(self._clock(), 3)
        if self._file >= 0:
            text = json.dumps(dataclasses.asdict(self.record)).encode()
            os.pwrite(self._file, text.ljust(LINE - 1) + b"\n", self._offset)

    def note(self, step: int, seconds: float) -> None:
        """``step`` is done and took ``seconds``; a step that was done before is one after a rollback."""
        record = self.record
        if step <= record.step:
            self._go_back(step - 1)
        record.step, record.seconds = step, record.seconds + seconds
        if self._main:
            with contextlib.suppress(OSError):
                self._write()

    def _go_back(self, step: int) -> None:
        record = self.record
        record.lost_steps += record.step - step
        _, _, record.seconds = _cut((record.from_step, record.step, record.seconds), step)
        record.from_step, record.step = min(record.from_step, step), step

    @property
    def restarts(self) -> int:
        """Starts of the run after its first."""
        return len(self._earlier)

    @property
    def lost_steps(self) -> int:
        """Steps done again, in all starts."""
        return sum(record.lost_steps for record in [*self._earlier, self.record])

    @property
    def seconds(self) -> float:
        """Of steps that count, in all starts."""
        return useful_seconds([*self._earlier, self.record])

    def wall_seconds(self) -> float:
        """Since the run's first start began, pauses between starts included."""
        first = [*self._earlier, self.record][0].time
        return max(self._clock() - first, self.seconds)  # clocks of two machines may differ

    def goodput(self) -> float:
        """Seconds of steps that count over the seconds since the run's first start, 0..1."""
        wall = self.wall_seconds()
        return self.seconds / wall if wall > 0 else 0.0

    def row(self) -> dict[str, float]:
        """What a metrics row says of it; empty on other ranks than 0."""
        if not self._main:
            return {}
        return {
            "perf/goodput": self.goodput(),
            "health/restarts": float(self.restarts),
            "health/lost_steps": float(self.lost_steps),
        }

    def end(self, outcome: str) -> None:
        """Note how this start ended, durably."""
        self.record.outcome = outcome
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self._write()
                os.fsync(self._file)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
