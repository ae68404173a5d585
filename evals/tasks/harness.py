"""Tasks of lm-evaluation-harness from a local folder, through our scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.config import EvalConfig
from evals.harness import run_harness
from evals.scorer import Scorer
from evals.tasks.protocol import Result, Task
from trellis_dist.files import sha256_file

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASK"]


def _folder(config: EvalConfig) -> Path:
    folder = Path(config.harness_folder or "")
    if not config.harness_folder or not folder.is_dir():
        raise ValueError(f"evals.harness_folder = {config.harness_folder}: name a folder of task files")
    return folder


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    """The folder counts by the content of its files, data that lies in it included."""
    folder = _folder(config)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        "files": {name: sha256_file(path) for name, path in files.items()},
        "tasks": sorted(config.harness_tasks),
        "limit": config.harness_limit,
    }


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    import lm_eval

    scorer = Scorer(subject.model, subject.tokenizer)
    limit = config.harness_limit or None
    outcome = run_harness(scorer, config.harness_tasks, include_path=_folder(config), limit=limit)
    return {
        "results": {task: _numbers(metrics) for task, metrics in outcome["results"].items()},
        "questions": {task: len(samples) for task, samples in outcome["samples"].items()},
        "harness_version": lm_eval.__version__,
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value; the harness writes "acc,none" for a metric without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if "," in name and isinstance(value, int | float) and "_stderr" not in name
    }


def _scalars(result: Result) -> dict[str, float]:
    return {
        f"harness/{task}/{metric}": value
        for task, metrics in result["results"].items()
        for metric, value in metrics.items()
    }


TASK = Task(name="harness", settings=_settings, run=_run, scalars=_scalars)
