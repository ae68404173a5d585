"""`trellis run`: prepare, train (stopped and resumed half-way), evaluate, report; what is done is re-used."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.preflight import check_machine, check_source, fit_to_machine
from launch.recipe import Recipe
from launch.run_folder import StageSeconds, anchored, claim_run
from launch.training_run import train

__all__ = ["main_job", "render_summary"]

# Unix time at which quickstart.sh began, so that the installation counts.
STARTED_AT = "TRELLIS_STARTED_AT"
Say = Callable[[str], None]


def main_job(recipe: Recipe, run_dir: Path, *, say: Say = print, max_restarts: int = 0) -> dict[str, Any]:
    """Do what is left of the job and return its summary (also ``RUN/summary.json``, ``RUN/report.html``).

    ``max_restarts`` is what ``launch.training_run.train`` makes of it.

    Raises:
        ValueError, OSError: what a user can change, one line each.
        launch.failures.RankError: a training rank failed.
        launch.ending.TerminatedError: SIGTERM or SIGUSR1; the run was saved.
    """
    started = float(os.environ.get(STARTED_AT, time.time()))
    check_source(recipe)
    recipe = anchored(fit_to_machine(recipe, say=say))
    trained_on = _trained_on(run_dir, recipe.training.steps)
    if trained_on is None:
        check_machine(recipe, run_dir, say=say)  # before minutes of preparation
    claim_run(run_dir, recipe)
    seconds = StageSeconds(run_dir)
    fingerprint = _prepare(recipe, seconds, say)
    if trained_on == fingerprint:
        say("train: done before, re-used")
    else:
        _train_in_two_halves(recipe, run_dir, seconds, say, started=started, max_restarts=max_restarts)
    return _evaluate(recipe, run_dir, seconds, say)


def render_summary(summary: dict[str, Any], run_dir: Path) -> str:
    """The closing lines of `trellis run`: the numbers, then where things are."""
    shown = {key: value for key, value in summary.items() if not key.startswith("decode/")}
    rows = [f"  {key:<36} {_number(value)}" for key, value in sorted(shown.items()) if _number(value)]
    if "seconds/first_loss" in summary:
        rows.append(f"time to the first loss line: {summary['seconds/first_loss']:.0f} s after the start")
    rows.append(f"results in {run_dir}: report.html, summary.json, metrics.jsonl, evals/, checkpoints/")
    rows.append(f"curves: .venv/bin/tensorboard --logdir {run_dir / 'tensorboard'}")
    return "\n".join(rows)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


@dataclass
class _Stage:
    """A stage at work; ``reused`` is set when it found everything done before."""

    reused: bool = False


@contextmanager
def _timed(name: str, seconds: StageSeconds, say: Say) -> Iterator[_Stage]:
    """Announce a stage and add its time to ``seconds``, also when it fails or is interrupted."""
    say(f"{name}: started")
    stage, start = _Stage(), time.monotonic()
    try:
        yield stage
    finally:
        if not stage.reused:
            seconds.add(name, time.monotonic() - start)
    say(
        f"{name}: "
        + ("done before, re-used" if stage.reused else f"done in {time.monotonic() - start:.0f} s")
    )


def _prepare(recipe: Recipe, seconds: StageSeconds, say: Say) -> str:
    """Make the token shards (or find them made of the same text), and return the data set's fingerprint."""
    from data_pipeline.job import prepare
    from data_pipeline.manifest import load_manifest

    try:
        before = load_manifest(recipe.data.directory).fingerprint
    except (OSError, ValueError):  # none, or one that cannot be read: prepare puts it right
        before = None
    with _timed("prepare", seconds, say) as stage:
        manifest = prepare(
            recipe.data,
            progress=recipe.logging.progress,
            chunk_size=recipe.model.grain,
        )
        stage.reused = manifest.fingerprint == before
    if "prepare" not in seconds.all():
        seconds.record("prepare", sum(manifest.seconds.values()))
    return manifest.fingerprint


def _trained_on(run_dir: Path, steps: int) -> str | None:
    """Fingerprint of the data a finished run was trained on; None when its last step is not there."""
    from checkpoints.state import load_run_state

    path, step = _newest(run_dir)
    return str(load_run_state(path)["data"]["fingerprint"]) if path is not None and step >= steps else None


def _newest(run_dir: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that verifies, and its step; (None, 0) without one."""
    from checkpoints.commit import step_of
    from checkpoints.state import latest_verified

    path = latest_verified(run_dir / "checkpoints")
    return path, (path and step_of(path)) or 0


def _train_in_two_halves(
    recipe: Recipe,
    run_dir: Path,
    seconds: StageSeconds,
    say: Say,
    *,
    started: float,
    max_restarts: int,
) -> None:
    """Stop at half the steps and continue from the checkpoint in new processes, as after a crash."""
    half = recipe.training.steps // 2
    if _newest(run_dir)[1] < half:
        with _timed("train_first_half", seconds, say), _FirstLoss(run_dir, seconds, started):
            train(recipe, run_dir, stop_at_step=half, max_restarts=max_restarts)
        say(f"train: stopped at step {half}; continuing from its checkpoint in new processes")
    with _timed("train_second_half", seconds, say):
        train(recipe, run_dir, resume="require" if half else "auto", max_restarts=max_restarts)


def _evaluate(recipe: Recipe, run_dir: Path, seconds: StageSeconds, say: Say) -> dict[str, Any]:
    """Score what has no stored result yet, then write summary and report."""
    from evals.evaluate import evaluate_run
    from evals.report import write_run_report
    from evals.summary import write_summary

    before = _stored_results(run_dir)
    with _timed("eval", seconds, say) as stage:
        evaluate_run(run_dir, recipe.evals, progress=recipe.logging.progress)
        stage.reused = _stored_results(run_dir) == before
    summary: dict[str, Any] = write_summary(run_dir, seconds.all())
    write_run_report(run_dir)  # after the summary: it shows the seconds per stage
    return summary


def _stored_results(run_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run_dir / "evals").glob("*.json")}


class _FirstLoss:
    """Records the seconds from ``started`` (Unix time) to the first line of metrics, as soon as it is there.

    A start that was killed before that line recorded nothing, and the next one measures its own.
    """

    def __init__(self, run_dir: Path, seconds: StageSeconds, started: float) -> None:
        self._metrics, self._seconds = run_dir / "metrics.jsonl", seconds
        self._started = started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _FirstLoss:
        if "first_loss" not in self._seconds.all() and not self._has_row():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _has_row(self) -> bool:
        return self._metrics.is_file() and self._metrics.stat().st_size > 0

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            if self._has_row():
                self._seconds.record("first_loss", time.time() - self._started)
                return
