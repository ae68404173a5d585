"""What a person, or a program, sees of a run while it trains.

On a terminal a progress bar (rich) with the interval lines above it; plain lines everywhere else: no colours,
no cursor movements. What is printed beside the interval lines also goes to ``RUN/console.jsonl``, one JSON
object per print; the numbers of an interval line are those of its row in ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

__all__ = ["Console", "append_event", "interval_line", "short_time"]

# What an interval line says, the most important first: a narrow terminal shows as many as fit.
PARTS: Mapping[str, Callable[[float], str]] = {
    "loss/train": "loss {:.4f}".format,
    "loss/validation": "validation {:.4f}".format,
    "optim/gradient_norm": "grad norm {:.3f}".format,
    "perf/tokens_per_second": "{:,.0f} tokens/s".format,
    "perf/mfu": "MFU {:.1%}".format,
    "memory/peak_bytes": lambda value: f"memory {value / 2**30:.2f} GiB",
    "perf/goodput": "goodput {:.1%}".format,
    "optim/lr": "lr {:.2e}".format,
    "validation/bits_per_byte": "bits/byte {:.4f}".format,
    "health/skipped_steps": lambda value: f"skipped {value:.0f}" if value else "",
    "health/restarts": lambda value: f"restarts {value:.0f}" if value else "",
    "health/lost_steps": lambda value: f"lost steps {value:.0f}" if value else "",
}
REDRAW_S = 0.2  # between two drawings of the bar


def short_time(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour; whole seconds."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def interval_line(
    row: Mapping[str, float], *, steps: int, eta: float | None = None, width: int | None = None
) -> str:
    """One line of at most ``width`` characters for ``row``: what does not fit is left out from the end.

    Args:
        row: as in ``metrics.jsonl``; keys that are not there are left out.
        steps: of the whole run.
        eta: seconds to its end, where they are known.
    """
    step = int(row["step"])
    line = f"step {step}/{steps} ({100 * step / steps:.0f}%)"
    parts = [f"ETA {short_time(eta)}"] if eta is not None else []
    parts += filter(None, (show(row[key]) for key, show in PARTS.items() if key in row))
    for part in parts:
        if width is not None and len(line) + 3 + len(part) > width:
            break
        line += f" | {part}"
    return line


def append_event(path: Path, kind: str, text: str, **facts: Any) -> None:
    """Append one event to a ``console.jsonl``: unix time, kind, text and facts. Raises ``OSError``."""
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, "text": text, **facts}) + "\n"
    # One write of a file opened for appending, so that two processes never mix their lines.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class Console:
    """The lines of one start of a run, and the bar below them on a terminal."""

    def __init__(
        self,
        *,
        steps: int,
        first: int,
        progress: bool,
        log: Path | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin at step ``first`` of ``steps``.

        Args:
            progress: draw a bar if ``stream`` is a terminal that can (``TERM`` is not "dumb").
            log: the file of events; none is kept without.
            stream: standard error unless given.
            clock: seconds; the time left is counted from the first step of this start.
        """
        self._stream = stream or sys.stderr
        self._steps, self._first, self._clock, self._log = steps, first, clock, log
        self._mark: tuple[int, float] | None = None
        self._bar = _Bar(self._stream, steps=steps, first=first, clock=clock) if progress else None
        if self._bar is not None and not self._bar.start():
            self._bar = None

    @property
    def width(self) -> int | None:
        """Characters of the terminal; None where lines are of any length."""
        return self._bar.width if self._bar is not None else None

    def advance(
        self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Note that ``step`` is done, and show it with its numbers in the bar."""
        if self._mark is None:
            self._mark = (step, self._clock())
        if self._bar is not None:
            fields = {
                "eta": "" if (eta := self._eta(step)) is None else f"ETA {short_time(eta)}",
                "loss": "" if loss is None else f"loss {loss:.4f}",
                "speed": "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s",
            }
            self._bar.advance(step, fields)

    def say(self, text: str, *, kind: str | None = None, **facts: Any) -> None:
        """Print ``text`` above the bar and log it; ``kind``: "alert" or "note" by its words unless given."""
        kind = kind or ("alert" if text.startswith("alert:") else "note")
        self._print(text, style={"alert": "bold yellow", "start": "dim"}.get(kind, ""))
        if self._log is None:
            return
        try:
            append_event(self._log, kind, text, **facts)
        except OSError as error:
            self._log = None
            self._print(f"alert: {error}: console.jsonl is not written until the next start", style="")

    def line(self, row: Mapping[str, float]) -> None:
        """Print the interval line of ``row``."""
        eta = row.get("perf/eta_seconds", self._eta(int(row["step"])))
        self._print(interval_line(row, steps=self._steps, eta=eta, width=self.width), style="")

    def _print(self, text: str, *, style: str) -> None:
        with contextlib.suppress(OSError):  # a terminal or a pipe that went away ends no run
            if self._bar is not None:
                self._bar.print(text, style=style)
            else:
                print(text, file=self._stream, flush=True)

    def _eta(self, step: int) -> float | None:
        if self._mark is None or step <= self._mark[0]:
            return None
        per_step = (self._clock() - self._mark[1]) / (step - self._mark[0])
        return per_step * (self._steps - step)

    def close(self) -> None:
        """Remove the bar; lines may still be printed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Bar:
    """rich's progress bar, drawn when the loop says so: no thread draws while a rank hangs or ends."""

    def __init__(self, stream: TextIO, *, steps: int, first: int, clock: Callable[[], float]) -> None:
        self._stream, self._steps, self._first, self._clock = stream, steps, first, clock
        self._drawn = float("-inf")
        self._console: Any = None
        self._progress: Any = None

    def start(self) -> bool:
        """Draw the bar; False where the stream is no terminal, or one that cannot move its cursor."""
        if not self._stream.isatty():
            return False
        try:
            self._console = _terminal(self._stream)
        except ImportError:  # rich comes with the command; a loop of one's own does without
            return False
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return False
        self._progress = _columns(self._console)
        blank = {"eta": "", "loss": "", "speed": ""}
        self._task = self._progress.add_task("", total=self._steps, completed=self._first, **blank)
        with contextlib.suppress(OSError):
            self._progress.start()
            self._console.show_cursor(True)  # a rank may end at once, by a signal, and leave the terminal so
        return True

    @property
    def width(self) -> int:
        return int(self._console.width)

    def advance(self, step: int, fields: Mapping[str, str]) -> None:
        self._progress.update(self._task, completed=step, **fields)
        now = self._clock()
        if now - self._drawn < REDRAW_S and step < self._steps:
            return
        self._drawn = now
        with contextlib.suppress(OSError):
            self._progress.refresh()

    def print(self, text: str, *, style: str) -> None:
        # soft_wrap: a line is the terminal's to break, so that it can be copied whole
        self._console.print(text, style=style or None, soft_wrap=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()


def _terminal(stream: TextIO) -> Any:
    from rich.console import Console as RichConsole

    class Terminal(RichConsole):
        def on_broken_pipe(self) -> None:  # rich would end the process
            self.quiet = True

    return Terminal(file=stream, highlight=False, markup=False, emoji=False)


def _columns(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

    live = [TextColumn(f"{{task.fields[{name}]}}") for name in ("eta", "loss", "speed")]
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        *live,
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
