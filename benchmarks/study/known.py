"""A result counts for the run that it is of: settings, tokens, seed and recipe, not its name alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.order import tasks
from benchmarks.study.plan import task_of
from launch.experiments.runs import RunSpec
from launch.experiments.spec import what_fixes
from launch.recipe import dotted_items, parse_recipe, resolve
from trellis_dist.files import digest

__all__ = ["check_results", "stored_digest"]

Results = Mapping[str, Mapping[str, Any]]
_REMEDY = "remove its result to train it again, or undo the change"


def check_results(results: Results) -> None:
    """Raise ValueError where a file holds another run than the plan has under its name, or another recipe."""
    planned = {task.name: task.about() for task in tasks(results)}
    for name, found in results.items():
        about: dict[str, Any] = found["about"]
        for key, value in planned.get(name, about).items():
            if about.get(key) != value:
                raise ValueError(f"{name} has {key} {about.get(key)} and the plan has {value}: {_REMEDY}")
        _check_recipe(name, found)


def _check_recipe(name: str, found: Mapping[str, Any]) -> None:
    task = task_of(name, found)
    if task.kind == "recall":
        from benchmarks.study.recall import mark

        stored, now = found["digest"], mark(task.settings, seed=task.seed)
    else:
        stored, now = stored_digest(found, task.spec(Path("x"))), task.spec(Path("x")).digest
    if stored != now:
        raise ValueError(
            f"{name} was trained with another recipe (digest {stored[:12]}) than base.toml and plan.toml "
            f"give now ({now[:12]}): {_REMEDY}"
        )


def stored_digest(found: Mapping[str, Any], spec: RunSpec) -> str:
    """The digest of a result's recipe; a key that a later version added counts with its default."""
    if digest(found.get("recipe", {})) != found["digest"]:
        return str(found["digest"])
    now = resolve(spec.resolved)
    fixed = what_fixes(now)
    whole = {key: value for key, value in dotted_items(now) if key not in fixed} | found["recipe"]
    return digest(what_fixes(resolve(parse_recipe(_nested(whole), source=spec.name))))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found
