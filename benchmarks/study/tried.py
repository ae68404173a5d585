"""Runs by hand: a model of the plan with keys changed, to find what is worth a place in the plan.

They choose nothing: the plan reads no result of theirs. They are kept, counted in the budget and shown in
docs/study.md, so that what was looked at before a plan was made can be looked at again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.study.one import measured, train
from benchmarks.study.plan import Settings, Task, models, plan, table

__all__ = ["changes_of", "try_text"]


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
    task = Task(f"try-{name}", "tune", settings, tokens=tokens, characters=characters)
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
