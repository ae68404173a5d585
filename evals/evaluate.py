"""Score a run: each task's result is one JSON file, kept under a key of everything it depends on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.pins import pinned
from evals.config import EvalConfig
from evals.curves import events_file, write_events
from evals.runs import (
    LoadedRun,
    checkpoint_digest,
    find_checkpoint,
    find_dataset,
    load_run,
    read_recipe,
    step_of_checkpoint,
)
from evals.tasks.protocol import Task
from evals.tasks.registry import get_task
from trellis_dist.files import digest, read_json, write_json

__all__ = ["Job", "check_eval_inputs", "evaluate_run", "job_of", "log_scalars", "run_job", "stored_result"]

# Part of every key: raise it when a task's numbers change their meaning.
FORMAT = 2


@dataclass(frozen=True)
class Job:
    """One task on one checkpoint.

    Attributes:
        run_dir, checkpoint, step: what is scored.
        task: its name.
        settings: the part of the configuration its numbers depend on.
        data: fingerprint of the data set.
        key: hash of (checkpoint digest, task, settings, tokenizer, data set).
    """

    run_dir: Path
    checkpoint: Path
    step: int
    task: str
    settings: Mapping[str, Any]
    data: str
    key: str

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        return self.run_dir / "evals" / f"{self.task}-step-{self.step}.json"


def check_eval_inputs(config: EvalConfig) -> None:
    """Refuse before training what scoring would refuse after it: files that are missing, a missing device.

    Raises:
        ValueError, OSError: as the task would, naming the field.
    """
    for name in config.tasks:
        get_task(name).settings(config)  # part of a result's key: reads every file the task depends on


def job_of(
    run_dir: Path, checkpoint: Path, task: Task, config: EvalConfig, *, dataset_dir: Path | None = None
) -> Job:
    """The job and its key. Raises ValueError or OSError when the run's data set is missing or another."""
    recipe = read_recipe(run_dir)
    _, manifest = find_dataset(run_dir, checkpoint, dataset_dir=dataset_dir)
    settings = dict(task.settings(config))
    parts = {
        "format": FORMAT,
        "checkpoint": checkpoint_digest(checkpoint),
        "task": task.name,
        "settings": settings,
        "tokenizer": manifest.tokenizer["sha256"],
        "data": manifest.fingerprint,
        "sequence_length": recipe["data"].get("sequence_length"),
    }
    step, data = step_of_checkpoint(checkpoint), manifest.fingerprint
    return Job(run_dir, checkpoint, step, task.name, settings, data, digest(parts))


def stored_result(job: Job) -> dict[str, Any] | None:
    """The record of a job that was run before, or None; a file of another key or a damaged one is None."""
    if not job.path.is_file():
        return None
    try:
        record = read_json(job.path)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("key") != job.key:
        return None
    record.setdefault("scalars", get_task(job.task).scalars(record["result"]))
    return record


def run_job(job: Job, loaded: LoadedRun, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    """Run the task, keep its record and log its scalars at the training step."""
    task = get_task(job.task)
    start = time.perf_counter()
    result = task.run(loaded, config, progress)
    record: dict[str, Any] = {
        "key": job.key,
        "task": job.task,
        "step": job.step,
        "settings": dict(job.settings),
        "data": job.data,
        "seconds": time.perf_counter() - start,
        "result": result,
        "scalars": task.scalars(result),
    }
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.path, record)
    log_scalars(job, record)
    return record


def log_scalars(job: Job, record: Mapping[str, Any]) -> None:
    """The record's scalars in the run's TensorBoard folder; the same call again leaves the same points.

    Whoever re-uses a stored record calls it too: its writer may have died between the record and the points.
    """
    path = events_file(job.run_dir, job.task, job.step)
    if not path.is_file() or path.stat().st_mtime < job.path.stat().st_mtime:
        write_events(path, record["scalars"], step=job.step, time=job.path.stat().st_mtime)


def evaluate_run(
    run_dir: Path,
    config: EvalConfig,
    *,
    progress: bool = True,
    step: int | None = None,
    dataset_dir: Path | None = None,
) -> dict[str, Any]:
    """Score the newest verified checkpoint of a run (or the one of ``step``) on the tasks of ``config``.

    Writes RUN/evals/<task>-step-<N>.json and TensorBoard scalars at the training step; a result whose key is
    there already is re-used, and the model is loaded only when something is left to run.

    Args:
        dataset_dir: where the run's data set lies now; None looks where the recipe says.

    Returns:
        Per task its record: "key", "task", "step", "settings", "data", "seconds", "result", "scalars".

    Raises:
        ValueError, OSError: no run, no verified checkpoint, no data set or another than the one trained on,
            or settings that do not fit them.
    """
    run_dir = Path(run_dir)
    checkpoint = find_checkpoint(run_dir, step=step)
    loaded: LoadedRun | None = None
    records: dict[str, Any] = {}
    with pinned(checkpoint, f"eval-{os.getpid()}"):  # a run at work may be about to remove it
        for name in config.tasks:
            job = job_of(run_dir, checkpoint, get_task(name), config, dataset_dir=dataset_dir)
            record = stored_result(job)
            if record is None:
                loaded = loaded or load_run(
                    run_dir, step=job.step, device=config.device, dataset_dir=dataset_dir
                )
                record = run_job(job, loaded, config, progress=progress)
            else:
                log_scalars(job, record)
            records[name] = record
    return records
