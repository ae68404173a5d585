"""Runs by hand: a model of the plan with keys changed, to find what is worth a place in the plan.

They choose nothing: the plan reads no result of theirs. They are kept, counted in the budget and shown in
docs/study.md, so that what was looked at before a plan was made can be looked at again. Where the plan comes
to name a run with the very settings of one, that one is the plan's run: nothing is trained twice.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.study.known import stored_digest
from benchmarks.study.one import measured, train
from benchmarks.study.order import tasks
from benchmarks.study.plan import Settings, Task, models, plan, table
from benchmarks.study.results import Store

__all__ = ["adopt", "changes_of", "run_name", "try_text"]


def run_name(name: str) -> str:
    """Of the run folder, where results by hand are NAME."""
    return f"try-{name}"


def adopt(store: Store) -> list[str]:
    """Make runs of the plan of the runs by hand that it has come to name; a line on each."""
    lines = []
    while (twins := _twins(store)) is not None:
        name, task = twins
        found = store.tried()[name]
        kept = {key: value for key, value in found.items() if key not in ("name", "tried")}
        store.write(task.name, {"name": task.name, "about": task.about(), "tried_as": name, **kept})
        (store.folder / "tried" / f"{name}.json").unlink()
        lines.append(f"{task.name}: run by hand before, as {name}")
    return lines


def _twins(store: Store) -> tuple[str, Task] | None:
    """A run by hand and the run of the plan, not finished, that it is."""
    known = store.runs()
    left = [task for task in tasks(known) if task.name not in known]
    pairs = itertools.product(store.tried().items(), left)
    return next(((name, task) for (name, found), task in pairs if _is(found, task)), None)


def _is(found: Mapping[str, Any], task: Task) -> bool:
    """Whether a run by hand, of seed 0 always, was trained and scored as ``task`` would be."""
    wanted = task.about()["tokens"], task.characters, task.settings.rate, task.seed
    done = found["tried"]["tokens"], found["validation"].get("characters"), found["tried"]["rate"], 0
    if wanted != done or task.kind not in ("tune", "vary", "search"):
        return False
    spec = task.spec(Path("x"))
    return spec.digest == stored_digest(found, spec)


def changes_of(lines: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE lines, values as in a recipe (TOML); raises ValueError where one is neither."""
    found: dict[str, Any] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            equals = ""
        if not equals:
            raise ValueError(f"--set {line}: write KEY=VALUE as in a recipe, text in double quotes")
    return found


def try_text(
    name: str, model: str, rate: float, changed: Mapping[str, Any], *, tokens: int, books: Path, work: Path
) -> dict[str, Any]:
    """Train on so many tokens of the novels, score on the beginnings of the validation books.

    Raises:
        ValueError: an unknown model, or keys or tokens of which no run can be made.
    """
    if model not in models():
        raise ValueError(f"--model {model}: use one of {', '.join(models())}")
    settings = Settings(model, rate, table(model) | dict(changed))
    characters = plan()["sizes"]["tuning_characters"]
    task = Task(run_name(name), "tune", settings, tokens=tokens, characters=characters)
    if task.steps < 1:
        raise ValueError(f"--tokens {tokens}: an update has {task.step_tokens}, use as many or more")
    with measured(work / "core-seconds" / f"{task.name}.json") as meter:
        found = train(task, books=books, work=work)
    about = {
        "name": name,
        "tried": {"model": model, "rate": rate, "tokens": task.about()["tokens"], "set": dict(changed)},
    }
    cost = {"core_seconds": round(meter["seconds"], 1), "machine": machine(), "versions": versions()}
    return about | found | cost
