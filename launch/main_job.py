"""`trellis run`: prepare, train (stopped and resumed half-way), evaluate, report; what is done is re-used."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.preflight import check_source
from launch.recipe import Recipe, resolve
from launch.run_folder import Stages, claim_run
from launch.training_run import train
from launch.worker import Resume
from trellis_dist.files import digest

__all__ = ["main_job", "render_summary"]

STARTED_AT = "TRELLIS_STARTED_AT"


def main_job(recipe: Recipe, run_dir: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is left of the job and return its summary (also ``RUN/summary.json``, ``RUN/report.html``).

    Raises:
        ValueError, OSError: what a user can change, one line each.
        launch.ranks.RankError: a training rank failed.
    """
    from evals.report import write_run_report
    from evals.summary import write_summary

    check_source(recipe)
    claim_run(run_dir, recipe)
    stages = Stages(run_dir)
    keys = _keys(recipe)
    _stage(stages, "prepare", keys["prepare"], _has_shards(recipe), lambda: _prepare(recipe), say)
    _train_in_two_halves(recipe, run_dir, stages, keys["train"], say)
    evaluated = any((run_dir / "evals").glob("*.json"))
    fresh = _stage(stages, "eval", keys["eval"], evaluated, lambda: _evaluate(recipe, run_dir), say)
    summary: dict[str, Any] = write_summary(run_dir, dict(stages.seconds()))
    if fresh or not (run_dir / "report.html").is_file():
        write_run_report(run_dir)
    return summary


def render_summary(summary: dict[str, Any], run_dir: Path) -> str:
    """The closing lines of `trellis run`: where things are, then the numbers."""
    rows = [f"  {key:<40} {_number(value)}" for key, value in sorted(summary.items()) if _number(value)]
    where = [f"results in {run_dir}: report.html, summary.json, metrics.jsonl, tensorboard/, checkpoints/"]
    return "\n".join([*rows, *where])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _keys(recipe: Recipe) -> dict[str, str]:
    """What each stage's result depends on; a changed answer runs that stage and those after it again."""
    resolved = resolve(recipe)
    # The default corpus is the running Python's library, so another Python is another corpus.
    shards = {k: v for k, v in resolved["data"].items() if k not in ("sequence_length", "seed", "packing")}
    prepare = digest([shards, platform.python_version() if recipe.data.source.kind == "stdlib" else None])
    elsewhere = ("evals", "logging", "checkpoint", "choices", "description")
    trained = {k: v for k, v in resolved.items() if k not in elsewhere}
    train_key = digest([prepare, trained])
    return {"prepare": prepare, "train": train_key, "eval": digest([train_key, resolved["evals"]])}


def _stage(
    stages: Stages, name: str, key: str, present: bool, work: Callable[[], None], say: Callable[[str], None]
) -> bool:
    """Run ``work`` unless its result is there already; True when it ran."""
    if present and stages.done(name, key):
        say(f"{name}: done before, re-used")
        return False
    say(f"{name}: started")
    start = time.monotonic()
    work()
    seconds = time.monotonic() - start
    stages.finish(name, key, seconds)
    say(f"{name}: done in {seconds:.0f} s")
    return True


def _has_shards(recipe: Recipe) -> bool:
    return (Path(recipe.data.directory) / "manifest.json").is_file()


def _prepare(recipe: Recipe) -> None:
    from data_pipeline.job import prepare

    prepare(recipe.data, progress=recipe.logging.progress)


def _evaluate(recipe: Recipe, run_dir: Path) -> None:
    from evals.evaluate import evaluate_run

    evaluate_run(run_dir, recipe.evals, progress=recipe.logging.progress)


def _train_in_two_halves(
    recipe: Recipe, run_dir: Path, stages: Stages, key: str, say: Callable[[str], None]
) -> None:
    """Stop at half the steps and continue from the checkpoint in new processes, as after a crash."""
    steps = recipe.training.steps
    half = steps // 2
    finished = _newest_step(run_dir) >= steps
    if half > 0 and _newest_step(run_dir) < half:
        with _FirstLoss(run_dir, stages, key):
            _stage(
                stages, "train_first_half", key, False, lambda: train(recipe, run_dir, stop_at_step=half), say
            )
        say(
            f"train: stopped at step {_newest_step(run_dir)}; continuing from its checkpoint in new processes"
        )
    resume: Resume = "require" if half > 0 else "auto"
    _stage(stages, "train_second_half", key, finished, lambda: train(recipe, run_dir, resume=resume), say)


def _newest_step(run_dir: Path) -> int:
    from checkpoints.commit import list_steps

    return max(list_steps(run_dir / "checkpoints"), default=-1)


class _FirstLoss:
    """Seconds from the command's start (``TRELLIS_STARTED_AT``, or now) to the first line of metrics."""

    def __init__(self, run_dir: Path, stages: Stages, key: str) -> None:
        self._metrics, self._stages, self._key = run_dir / "metrics.jsonl", stages, key
        self._started = float(os.environ.get(STARTED_AT, time.time()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: float | None = None

    def __enter__(self) -> _FirstLoss:
        if not self._metrics.exists():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._seen is not None:
            self._stages.finish("first_loss", self._key, self._seen - self._started)

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            if self._metrics.exists() and self._metrics.stat().st_size > 0:
                self._seen = time.time()
                return
