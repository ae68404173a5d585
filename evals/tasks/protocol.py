"""What every task file offers: one `Task`, listed in `evals/tasks/registry.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evals.config import EvalConfig, TaskName

if TYPE_CHECKING:
    from evals.runs import LoadedRun

__all__ = ["Result", "Task"]

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way of scoring a loaded run.

    Attributes:
        name: key in `EvalConfig.tasks` and in the result's file name.
        settings: the part of the configuration that this task's numbers depend on; part of a result's key.
        run: (loaded run, configuration, progress) -> JSON result. Raises ValueError for what a user can fix.
        scalars: the numbers of a result that are worth a curve, by TensorBoard name.
    """

    name: TaskName
    settings: Callable[[EvalConfig], Mapping[str, Any]]
    run: Callable[[LoadedRun, EvalConfig, bool], Result]
    scalars: Callable[[Result], dict[str, float]]
