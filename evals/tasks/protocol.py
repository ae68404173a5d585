"""What every task file offers: its `Task`s, listed in `evals/tasks/registry.py`.

A result is a JSON mapping. Two keys mean the same in all of them:

    "groups"   name -> {"score", "low", "high", "samples"}: means in percent with their 95% intervals
    "samples"  list of `evals.samples.Sample.to_json()`: every scored question
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evals.config import EvalConfig, TaskName

__all__ = ["Result", "Task"]

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way of scoring a model.

    Attributes:
        name: key in `EvalConfig.tasks` and in the result's file name.
        settings: the part of the configuration that this task's numbers depend on; part of a result's key.
        run: (subject, configuration, progress) -> JSON result. Raises ValueError for what a user can fix.
        scalars: the numbers of a result that are worth a curve and a column, by TensorBoard name.
        chance: what a guess would get of those scalars, in percent, where that says something.
        needs_run: it scores a run (`evals.runs.LoadedRun`: recipe and data set) and no other model.
        takes_text: with ``evals.perplexity_text`` it scores any model, on that text.
    """

    name: TaskName
    settings: Callable[[EvalConfig], Mapping[str, Any]]
    run: Callable[[Any, EvalConfig, bool], Result]
    scalars: Callable[[Result], dict[str, float]]
    chance: Callable[[Result], dict[str, float]] = lambda result: {}
    needs_run: bool = False
    takes_text: bool = False

    def suits(self, config: EvalConfig, *, run: bool) -> bool:
        """Whether it scores a model that is a ``run``, or is none."""
        return run or not self.needs_run or (self.takes_text and bool(config.perplexity_text))
