"""One run of the study in a process of its own, so that its core-seconds can be told from the others'."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.study.plan import Task, plan
from benchmarks.study.results import Store
from trellis_dist.files import read_json, write_json

__all__ = ["EXIT_CUT", "do", "measured", "summary", "test_scores", "train", "used"]

# Status of a process whose time was over: what it did is saved, and it goes on when it is started again.
EXIT_CUT = 75
LOSSES = 25
# Kinds of runs whose test scores are made while the checkpoint is there, and read by `score --test` alone.
SEALED = ("full", "long")


def do(task: Task, *, books: Path, work: Path, store: Store, minutes: float | None) -> int:
    """Train and score a run and write its result; the exit status of the process.

    Raises:
        ValueError, OSError, FailedError: as `launch.experiments.runs.perform`.
    """
    from launch.experiments.runs import CutError

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with measured(work / "core-seconds" / f"{task.name}.json") as meter:
            found = (
                _recall(task)
                if task.kind == "recall"
                else train(task, books=books, work=work, minutes=minutes)
            )
            if task.kind in SEALED:
                # Counted with the run: what is sealed has no core-seconds of its own.
                store.write(f"sealed/{task.name}", test_scores(task, books=books, work=work))
    except (CutError, KeyboardInterrupt):
        return EXIT_CUT
    about = {"name": task.name, "about": task.about(), "core_seconds": round(meter["seconds"], 1)}
    path = store.write(task.name, about | found | {"machine": machine(), "versions": versions()})
    print(f"{task.name}: {_headline(found)}, {meter['seconds']:.0f} core-seconds; {path}", flush=True)
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def measured(path: Path) -> Iterator[dict[str, float]]:
    """Core-seconds of this process and its children, on top of those that earlier starts left in ``path``."""
    meter = {"seconds": read_json(path)["seconds"] if path.is_file() else 0.0}
    before = used()
    try:
        yield meter
    finally:
        meter["seconds"] += used() - before
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, meter)


def used() -> float:
    """What the budget counts, of which differences mean something.

    On CPUs CPU seconds, user and system, of this process and of the children that have ended, so that runs
    beside it do not count; on a GPU seconds.
    """
    if plan()["computes"]["counts"] == "clock":
        return time.monotonic()
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _recall(task: Task) -> dict[str, Any]:
    from benchmarks.study.recall import measure

    return measure(task.settings, seed=task.seed)


def train(task: Task, *, books: Path, work: Path, minutes: float | None = None) -> dict[str, Any]:
    """Train a run and score it on the validation books: what its result says of that.

    Raises:
        ValueError, OSError, FailedError, CutError: as `launch.experiments.runs.perform`.
    """
    from launch.experiments.runs import perform

    spec = task.spec(work)
    found = perform(spec, work, minutes=minutes, threads=plan()["computes"]["threads"])
    scored = _scored(task, work, books, "validation", task.characters)
    return summary(found) | {"overrides": _portable(spec.overrides), "validation": scored}


def _portable(overrides: tuple[str, ...]) -> list[str]:
    """Without the folder of this machine."""
    return [line for line in overrides if not line.startswith("data.source.path")]


def _scored(task: Task, work: Path, books: Path, split: Any, characters: int | None) -> dict[str, Any]:
    import torch

    from benchmarks.study.score import score_books, totals
    from evals.runs import load_run
    from evals.scorer import Scorer

    torch.set_num_threads(plan()["computes"]["threads"])
    start = time.perf_counter()
    loaded = load_run(
        work / "runs" / task.name, device=plan()["computes"]["device"], dataset_dir=work / "data"
    )
    scorer = Scorer(loaded.model, loaded.tokenizer)
    found = score_books(scorer, books, split, length=task.length, characters=characters)
    seconds = round(time.perf_counter() - start, 1)
    return totals(found) | {"characters": characters, "seconds": seconds, "books": found}


def test_scores(task: Task, *, books: Path, work: Path) -> dict[str, Any]:
    """A finished run on the test books."""
    return _scored(task, work, books, "test", None)


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the study keeps of a result of ``launch.experiments``."""
    from launch.experiments.spec import what_fixes

    training, losses = dict(found["training"]), found["training"]["train_losses"]
    kept = losses[:: -max(len(losses) // LOSSES, 1)][::-1]
    training["train_losses"] = [[step, round(loss, 4)] for step, loss in kept]
    del training["validation_losses"]
    return {
        "digest": found["digest"],
        "commit": found["commit"],
        "data": found["data"],
        "recipe": what_fixes(found["recipe"]),
        "model": found["model"],
        "training": training,
        "held_out": {key: found["validation"][key] for key in ("loss", "bits_per_byte", "bigram")},
    }


def _headline(found: Mapping[str, Any]) -> str:
    if "accuracy" in found:
        return ", ".join(f"{pairs} pairs {share:.2f}" for pairs, share in found["accuracy"].items())
    return f"{found['validation']['loss']:.4f} nats per token on the validation books"
