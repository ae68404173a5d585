"""What a run measures, written wherever it should go: see ``trellis_dist.training.writers``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trellis_dist.training.console import Console
from trellis_dist.training.writers import (
    Histogram,
    JsonLines,
    Row,
    Sink,
    TensorBoard,
    WandB,
    read_rows,
)

__all__ = ["JsonLines", "MetricsWriter", "TensorBoard", "read_rows"]


class MetricsWriter:
    """Everything rank 0 writes; on the other ranks every call does nothing.

    What goes wrong with a sink (a full disk, a service that is away) must not end a run that could still
    save its work: it is announced on the console and given up.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        main: bool,
        resumed_step: int,
        steps: int,
        tensorboard: bool,
        progress: bool,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open ``metrics.jsonl`` and ``tensorboard/`` in ``run_dir``.

        With ``wandb`` the run is also one of that W&B project, with ``config`` as its settings.
        """
        self._sinks: list[Sink] = []
        self._console: Console | None = None
        if not main:
            return
        log = run_dir / "console.jsonl"
        self._console = Console(steps=steps, first=resumed_step, progress=progress, log=log)
        self._sinks.append(JsonLines(run_dir / "metrics.jsonl", resumed_step=resumed_step))
        if tensorboard:
            self._sinks.append(TensorBoard(run_dir / "tensorboard", resumed_step=resumed_step))
        if wandb:
            self._open_wandb(run_dir, wandb, config or {})

    def _open_wandb(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            self._sinks.append(WandB(run_dir, project=project, config=config))
        except Exception as error:  # it raises classes of its own
            self.say(f"alert: nothing goes to W&B until the next start: {error}")

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, as a start that resumes there does."""
        for sink in list(self._sinks):
            self._try(sink, step, lambda sink=sink: sink.rewind(step))  # type: ignore[misc]

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
            self._try(sink, int(row["step"]), lambda sink=sink: sink.write(row))  # type: ignore[misc]

    def histograms(self, step: int, named: Mapping[str, Histogram]) -> None:
        """Write histograms by tag to where there is a form for them."""
        for sink in list(self._sinks):
            self._try(sink, step, lambda sink=sink: sink.histograms(step, named))  # type: ignore[misc]

    def _try(self, sink: Sink, step: int, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # W&B raises classes of its own
            lost = f"the {sink.title} of step {step} were not written"
            if not sink.lasting:
                lost = f"no {sink.title} from step {step} on, until the next start"
                self._sinks.remove(sink)
                self._close(sink)
            self.say(f"alert: {lost}: {error}")

    def close(self) -> None:
        """Close files and bar; what a full disk still refuses was announced with its row."""
        for sink in self._sinks:
            self._close(sink)
        if self._console:
            self._console.close()

    def _close(self, sink: Sink) -> None:
        with contextlib.suppress(Exception):
            try:
                sink.close()
            except TimeoutError as error:
                self.say(f"alert: {error}")
