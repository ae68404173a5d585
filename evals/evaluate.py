"""Score a run, or another model: each task's result is one JSON file, under a key of all it depends on.

On several ranks (evals/ranks.py) every rank calls the same function; rank 0 reads and writes the files.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.pins import pinned
from evals.config import EvalConfig
from evals.curves import events_file, write_events
from evals.ranks import current_ranks
from evals.runs import (
    LoadedRun,
    checkpoint_digest,
    find_checkpoint,
    find_dataset,
    load_run,
    read_recipe,
    step_of_checkpoint,
)
from evals.subject import Subject
from evals.tasks.protocol import Task
from evals.tasks.registry import TASKS, get_task
from trellis_dist.files import digest, read_json, write_json

__all__ = [
    "Job",
    "check_eval_inputs",
    "check_tasks",
    "evaluate_run",
    "evaluate_subject",
    "job_of",
    "keep_copy",
    "log_scalars",
    "record_file",
    "recorded_key",
    "run_job",
    "score_subject",
    "stored_result",
    "subject_key",
]

# Part of every key: raise it when a task's numbers change their meaning.
FORMAT = 4


@dataclass(frozen=True)
class Job:
    """One task on one checkpoint.

    Attributes:
        run_dir, checkpoint, step: what is scored.
        task: its name.
        settings: the part of the configuration its numbers depend on.
        data: fingerprint of the data set.
        key: hash of (checkpoint digest, task, settings, tokenizer, data set, model section).
        digest: of the checkpoint.
    """

    run_dir: Path
    checkpoint: Path
    step: int
    task: str
    settings: Mapping[str, Any]
    data: str
    key: str
    digest: str

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        return record_file(self.run_dir, self.task, self.step)


def record_file(run_dir: Path, task: str, step: int) -> Path:
    """Where a run keeps the result of a task at a step."""
    return run_dir / "evals" / f"{task}-step-{step}.json"


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
    settings, weights = dict(task.settings(config)), checkpoint_digest(checkpoint)
    parts = {
        "format": FORMAT,
        "checkpoint": weights,
        "task": task.name,
        "settings": settings,
        "tokenizer": manifest.tokenizer["sha256"],
        "data": manifest.fingerprint,
        "sequence_length": recipe["data"].get("sequence_length"),
        "model": recipe["model"],  # a chunk size changes the function and no weight
    }
    step, data = step_of_checkpoint(checkpoint), manifest.fingerprint
    return Job(run_dir, checkpoint, step, task.name, settings, data, digest(parts), weights)


def stored_result(job: Job) -> dict[str, Any] | None:
    """The record of a job that was run before, or None; a file of another key or a damaged one is None."""
    record = _stored(job.path, job.key)
    if record is not None:
        task = get_task(job.task)
        record.setdefault("scalars", task.scalars(record["result"]))
        record.setdefault("chance", task.chance(record["result"]))
    return record


def run_job(job: Job, loaded: LoadedRun, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    """Run the task, keep its record and log its scalars at the training step."""
    about = {"key": job.key, "task": job.task, "step": job.step, "settings": dict(job.settings)}
    record = {**about, "data": job.data, **_measured(get_task(job.task), loaded, config, progress=progress)}
    current_ranks().from_main(partial(_keep, job, record))
    return record


def score_subject(task: Task, subject: Subject, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    """The record of a task on any model, kept nowhere. Raises what the task raises."""
    return {**_about(subject, task, config), **_measured(task, subject, config, progress=progress)}


def _measured(task: Task, subject: Subject, config: EvalConfig, *, progress: bool) -> dict[str, Any]:
    """What running a task adds to its record."""
    start = time.perf_counter()
    result = task.run(subject, config, progress and current_ranks().is_main)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "result": result,
        "scalars": task.scalars(result),
        "chance": task.chance(result),
    }


def _keep(job: Job, record: Mapping[str, Any]) -> None:
    _write(job.path, record)
    log_scalars(job, record)


def log_scalars(job: Job, record: Mapping[str, Any]) -> None:
    """The record's scalars in the run's TensorBoard folder; the same call again leaves the same points.

    Whoever re-uses a stored record calls it too: its writer may have died between the record and the points.
    """
    _log(job.run_dir, job.task, job.step, record)


def _log(run_dir: Path, task: str, step: int, record: Mapping[str, Any]) -> None:
    path, kept = events_file(run_dir, task, step), record_file(run_dir, task, step).stat().st_mtime
    if not path.is_file() or path.stat().st_mtime < kept:
        write_events(path, record["scalars"], step=step, time=kept)


def keep_copy(run_dir: Path, record: Mapping[str, Any], *, task: str, step: int) -> None:
    """Keep and log a record in a run whose checkpoint of ``step`` is the one that it was made of elsewhere.

    Raises:
        OSError: the folder cannot be written.
    """
    scalars = {name: value for name, value in (record.get("scalars") or {}).items() if value is not None}
    whole = {**record, "scalars": scalars}
    _write(record_file(run_dir, task, step), whole)
    _log(run_dir, task, step, whole)


def recorded_key(run_dir: Path, *, task: str, step: int) -> str | None:
    """Key of the record that a run has of a task at a step; None without one that can be read."""
    path = record_file(run_dir, task, step)
    try:
        record = read_json(path) if path.is_file() else None
    except ValueError:
        return None
    return record.get("key") if isinstance(record, dict) else None


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
    run_dir, ranks = Path(run_dir), current_ranks()
    # A run at work saves newer ones meanwhile: one rank chooses.
    checkpoint = ranks.from_main(partial(find_checkpoint, run_dir, step=step))
    loaded: LoadedRun | None = None
    records: dict[str, Any] = {}
    with pinned(checkpoint, f"eval-{socket.gethostname()}-{os.getpid()}"):  # it may be about to remove it
        for name in config.tasks:
            job = job_of(run_dir, checkpoint, get_task(name), config, dataset_dir=dataset_dir)
            record = ranks.from_main(partial(_known, job))
            if record is None:
                loaded = loaded or load_run(
                    run_dir, step=job.step, device=config.device, dataset_dir=dataset_dir
                )
                record = run_job(job, loaded, config, progress=progress)
            records[name] = record
    return records


def _known(job: Job) -> dict[str, Any] | None:
    """The stored record, its scalars logged."""
    record = stored_result(job)
    if record is not None:
        log_scalars(job, record)
    return record


def check_tasks(config: EvalConfig, *, run: bool, name: str) -> None:
    """Refuse tasks that score a run where ``name`` is none. Raises ValueError."""
    strangers = [task for task in config.tasks if not get_task(task).suits(config, run=run)]
    if strangers:
        others = ", ".join(sorted(task for task in TASKS if TASKS[task].suits(config, run=False)))
        text = ", or name a text with evals.perplexity_text" if get_task(strangers[0]).takes_text else ""
        raise ValueError(
            f"{strangers[0]} scores a trained run on its held-out text, and {name} is no run folder: choose "
            f"others with --tasks ({others}){text}"
        )


def evaluate_subject(
    subject: Subject, config: EvalConfig, output: Path, *, progress: bool = True
) -> dict[str, Any]:
    """Score any model on the tasks of ``config``; a result in ``output`` whose key is the same is re-used.

    Writes output/<task>.json. Of a run the keys are not those of its own folder: nothing there is read.

    Returns:
        Per task its record: "key", "task", "model", "digest", "settings", "seconds", "result", "scalars".

    Raises:
        ValueError, OSError: a task that scores a run, or as the tasks raise.
    """
    ranks, output = current_ranks(), Path(output)
    check_tasks(config, run=isinstance(subject, LoadedRun), name=subject.name)
    records: dict[str, Any] = {}
    for name in config.tasks:
        task, path = get_task(name), output / f"{name}.json"
        about = _about(subject, task, config)
        record = ranks.from_main(partial(_stored, path, about["key"]))
        if record is None:
            record = {**about, **_measured(task, subject, config, progress=progress)}
            ranks.from_main(partial(_write, path, record))
        records[name] = record
    return records


def _about(subject: Subject, task: Task, config: EvalConfig) -> dict[str, Any]:
    """The part of a record that is known before the task has run."""
    run: dict[str, Any] = {}
    if isinstance(subject, LoadedRun):
        length = subject.recipe["data"].get("sequence_length")
        run = {"data": subject.data, "sequence_length": length, "model": subject.recipe["model"]}
    weights, tokenizer = subject.digest, subject.tokenizer_digest
    key = subject_key(task, config, weights=weights, tokenizer=tokenizer, **run)
    known = {"model": subject.name, "digest": subject.digest, "settings": dict(task.settings(config))}
    return {"key": key, "task": task.name, **known}


def subject_key(task: Task, config: EvalConfig, *, weights: str, tokenizer: str, **run: Any) -> str:
    """Hash of what a task's numbers depend on: digests of weights and tokenizer, settings, of a run more."""
    parts = {
        "format": FORMAT,
        "checkpoint": weights,
        "task": task.name,
        "settings": dict(task.settings(config)),
        "tokenizer": tokenizer,
    }
    return digest(parts | run)


def _stored(path: Path, key: str) -> dict[str, Any] | None:
    """A record that was written before under this key."""
    try:
        record = read_json(path) if path.is_file() else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
