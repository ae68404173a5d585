"""What the whole plan will cost: also the runs that cannot be named before others have been finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.study.order import tasks
from benchmarks.study.plan import Task, plan
from benchmarks.study.pool import estimate

__all__ = ["rehearsed", "whole_plan"]

Results = Mapping[str, Mapping[str, Any]]


def rehearsed(results: Results) -> list[Task]:
    """Every run that is left if the first rate and the form that tells noise are best and changes help."""
    found = dict(results)
    while left := [task for task in tasks(found) if task.name not in found]:
        found |= {task.name: _stand_in(task) for task in left}
    return [task for task in tasks(found) if task.name not in results]


def _stand_in(task: Task) -> dict[str, Any]:
    """A result with a loss that stands for nothing: it lets the plan go on."""
    rate, first = task.settings.rate, plan()["rates"]["grid"][0]
    loss = 5.0 + 0.1 * abs(math.log2(rate / first)) + 0.001 * task.seed - 0.1 * (task.kind == "vary")
    loss -= 0.01 * (task.settings.model == plan()["noise"]["model"])
    loss -= 0.01 * task.name.startswith("vary-combined")
    return {"name": task.name, "about": task.about(), "validation": {"loss": loss}, "choosing": 0.5}


def whole_plan(results: Results, *, used: float, budget: float) -> list[str]:
    """Lines: what the plan is expected to cost, by kind of run, and from where on the budget is over."""
    left = rehearsed(results)
    costs = {task.name: estimate(task, results) for task in left}
    kinds = dict.fromkeys(task.kind for task in left)
    lines = [_of_kind(kind, [task for task in left if task.kind == kind], costs) for kind in kinds]
    total = used + sum(costs.values())
    lines.append(
        f"the whole plan: {len(left)} runs left, {total:,.0f} core-seconds with what is used, "
        f"{total / 3600:.1f} core-hours of {budget / 3600:.1f}"
    )
    before = used
    for place, task in enumerate(left):
        before += costs[task.name]
        if before > budget:
            names = ", ".join(task.name for task in left[place:])
            return [*lines, f"expected beyond the budget, {len(left) - place} runs: {names}"]
    return lines


def _of_kind(kind: str, found: list[Task], costs: Mapping[str, float]) -> str:
    hours = sum(costs[task.name] for task in found) / 3600
    return f"{kind}: {len(found)} runs, {hours:.1f} core-hours"
