"""Tasks by name. A new task is one file here and one line below (and its name in `evals.config.TaskName`)."""

from __future__ import annotations

from collections.abc import Mapping

from evals.tasks import context_length, decode, harness, mqar, perplexity, ruler, sample, suites
from evals.tasks.protocol import Task

__all__ = ["TASKS", "get_task"]

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        perplexity.TASK,
        context_length.TASK,
        mqar.TASK,
        decode.TASK,
        sample.TASK,
        harness.TASK,
        *ruler.TASKS,
        *suites.TASKS,
    )
}


def get_task(name: str) -> Task:
    """The task of that name. Raises ValueError when there is none."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: choose among {', '.join(sorted(TASKS))}")
    return TASKS[name]
