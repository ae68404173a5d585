"""What a run measures, written three ways: JSON lines, TensorBoard events, one console line per interval."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trellis_dist.files import atomic_write
from trellis_dist.training.console import Console

__all__ = ["JsonLines", "MetricsWriter", "TensorBoard", "read_rows"]

Row = Mapping[str, float]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file (none without a file), less a line that a crash cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class JsonLines:
    """One JSON object per line, flushed per row. Non-finite numbers are written as null."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open for appending; rows after ``resumed_step`` are dropped, so that each step is there once."""
        kept = [row for row in read_rows(path) if row.get("step", 0) <= resumed_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append one row; ``OSError`` when the disk refuses."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: clean(value) for key, value in row.items()}) + "\n"


class TensorBoard:
    """Scalars under the names of the JSON rows; on resume TensorBoard hides events after the resumed step."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Open an event file in ``folder``."""
        from torch.utils.tensorboard import SummaryWriter

        # Also for step 0: a start that was killed before its first checkpoint has left events.
        self._writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=20)

    def write(self, row: Row) -> None:
        """Add every key but ``step`` as a scalar at ``row["step"]``; once failed, always failing."""
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, global_step=int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class MetricsWriter:
    """Everything rank 0 writes; on the other ranks every call does nothing.

    A full disk must not end a run that could still save its work, so a row that cannot be written is
    announced on the console and given up.
    """

    def __init__(
        self, run_dir: Path, *, main: bool, resumed_step: int, steps: int, tensorboard: bool, progress: bool
    ):
        """Open ``metrics.jsonl`` and ``tensorboard/`` in ``run_dir``."""
        self._sinks: list[JsonLines | TensorBoard] = []
        self._console: Console | None = None
        self._run_dir, self._tensorboard = run_dir, tensorboard
        if not main:
            return
        log = run_dir / "console.jsonl"
        self._console = Console(steps=steps, first=resumed_step, progress=progress, log=log)
        self._open(resumed_step)

    def _open(self, resumed_step: int) -> None:
        self._sinks = [JsonLines(self._run_dir / "metrics.jsonl", resumed_step=resumed_step)]
        if self._tensorboard:
            self._sinks.append(TensorBoard(self._run_dir / "tensorboard", resumed_step=resumed_step))

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, as a start that resumes there does."""
        if self._console is None:
            return
        for sink in self._sinks:
            _close(sink)
        try:
            self._open(step)
        except OSError as error:
            self.say(f"alert: metrics are not written until the next start: {error}")
            self._sinks = []

    def advance(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Move the progress bar, which shows these numbers of the step."""
        if self._console:
            self._console.advance(step, loss=loss, tokens_per_second=tokens_per_second)

    @property
    def width(self) -> int | None:
        """Characters of the terminal; None where there is none."""
        return self._console.width if self._console else None

    def say(self, text: str, *, kind: str | None = None, **facts: Any) -> None:
        """Print ``text`` and log it with ``facts``; as in :meth:`Console.say`."""
        if self._console:
            self._console.say(text, kind=kind, **facts)

    def write(self, row: Row) -> None:
        """Write one row everywhere."""
        if self._console:
            self._console.line(row)
        for sink in list(self._sinks):
            try:
                sink.write(row)
            except OSError as error:
                self._give_up(sink, row, error)

    def _give_up(self, sink: JsonLines | TensorBoard, row: Row, error: OSError) -> None:
        lost = f"the metrics of step {row['step']} were not written"
        if isinstance(sink, TensorBoard):
            lost = f"no TensorBoard events from step {row['step']} on, until the next start"
            self._sinks.remove(sink)
            _close(sink)
        self.say(f"alert: {lost}: {error}")

    def close(self) -> None:
        """Close files and bar; what a full disk still refuses was announced with its row."""
        for sink in self._sinks:
            _close(sink)
        if self._console:
            self._console.close()


def _close(sink: JsonLines | TensorBoard) -> None:
    with contextlib.suppress(OSError):
        sink.close()
