"""Which runs of associative recall a model has: learning rates upwards, and further seeds at the best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.plan import OURS, Settings, Task, models, number, plan, table

__all__ = ["recall_again", "recall_forms", "recall_tasks"]

Results = Mapping[str, Mapping[str, Any]]


def recall_tasks(name: str, own: Settings, results: Results) -> list[Task]:
    """Of main models and forms of Trellis two, of others one; while the best is the highest the next.

    Args:
        name: of the model, and of its runs.
        own: its settings; the rate is not read.
        results: finished runs by name, whose accuracies choose.
    """
    options = plan()["recall"]
    several = name == OURS or (name in models("ours", "main") and "rates" not in models()[name])
    found = [_task(name, own, rate) for rate in (options["rates"] if several else options["rates"][:1])]
    while (best := _best(found, results)) is not None:
        rate = float(f"{options['next'] * best.settings.rate:.6g}")
        if rate > options["most"] or any(task.settings.rate >= rate for task in found):
            break
        found.append(_task(name, own, rate))
    return found


def recall_forms() -> list[Task]:
    """Forms of Trellis and of baselines that recall alone has, at the first rate."""
    rate, found = plan()["recall"]["rates"][0], []
    for name, form in plan()["recall"]["forms"].items():
        kept = {key: value for key, value in table(form["of"]).items() if key not in form.get("unset", ())}
        found.append(_task(name, Settings(form["of"], 0.0, kept | form["set"]), rate))
    return found


def recall_again(name: str, own: Settings, results: Results) -> list[Task]:
    """Further seeds at the best of the learning rates; arguments as of ``recall_tasks``."""
    best = _best(recall_tasks(name, own, results), results)
    if best is None:
        return []
    return [_task(name, own, best.settings.rate, seed) for seed in plan()["recall"]["again"][name]]


def _best(found: list[Task], results: Results) -> Task | None:
    """That with the best accuracy on the rows to choose by, once all are finished."""
    if not all(task.name in results for task in found):
        return None
    return max(found, key=lambda task: float(results[task.name]["choosing"]))


def _task(name: str, own: Settings, rate: float, seed: int = 0) -> Task:
    options = plan()["recall"]
    changed = {key: value for key, value in own.set.items() if key.startswith("model.")} | options["set"]
    return Task(
        f"recall-{name}-lr{number(rate)}" + (f"-s{seed}" if seed else ""),
        "recall",
        Settings(own.model, rate, changed),
        seed=seed,
        tokens=options["steps"] * options["tokens_per_step"],
        group=name,
    )
