"""Runs below one root folder, by id, and the jobs that their committed checkpoints ask for."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from checkpoints.commit import list_steps
from evals.config import EvalConfig
from evals.evaluate import job_of, stored_result
from evals.pins import pin_job, sync_pins, unpin_job
from evals.queue import Queue
from evals.runs import read_recipe
from evals.tasks.registry import get_task

__all__ = ["PublicError", "Runs", "Watcher", "submit"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_log = logging.getLogger(__name__)


class PublicError(ValueError):
    """A refusal whose text names ids and nothing of this machine, so that a client may read it."""


class Runs:
    """The run folders directly below ``root``; a client names one by its folder name and nothing else."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"{root} is no folder: name the one that holds the run folders")
        self._root = root.resolve()

    def ids(self) -> list[str]:
        """Ids of all runs, sorted."""
        return sorted(p.name for p in self._root.iterdir() if self._is_run(p))

    def folder(self, run: str) -> Path:
        """The folder of a run id. Raises PublicError for anything that is none, paths included."""
        path = self._root / run
        if not _ID.fullmatch(run) or not self._is_run(path):
            raise PublicError(f"there is no run {run[:128]!r}: GET /runs lists them")
        return path

    def _is_run(self, path: Path) -> bool:
        """A real folder of this root (no link out of it) with a recipe."""
        return bool(_ID.fullmatch(path.name)) and not path.is_symlink() and (path / "recipe.json").is_file()

    def config(self, run: str) -> EvalConfig:
        """The evals section of the run's own recipe; clients cannot send settings."""
        from pydantic import TypeAdapter

        section = read_recipe(self.folder(run)).get("evals", {})
        return TypeAdapter(EvalConfig).validate_python(section)

    def steps(self, run: str) -> dict[int, Path]:
        """Committed checkpoints by step."""
        return list_steps(self.checkpoints(run))

    def checkpoints(self, run: str) -> Path:
        """The folder of a run's checkpoints."""
        return self.folder(run) / "checkpoints"


def submit(
    queue: Queue, runs: Runs, run: str, task: str, *, step: int | None = None, priority: int = 0
) -> tuple[str, bool]:
    """Queue one task on a committed checkpoint (the newest when ``step`` is None).

    The checkpoint is pinned until the job is over. A result that the run folder holds already is taken over
    instead of being made again.

    Returns:
        The job's key, and whether it is new to the queue.

    Raises:
        PublicError: unknown run or step.
        ValueError, OSError: unknown task, or a run whose recipe or data set cannot be used.
    """
    wanted_task, steps = get_task(task), runs.steps(run)
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise PublicError(f"run {run} has no committed checkpoint of step {step}: it has {have}")
    job = job_of(runs.folder(run), steps[wanted], wanted_task, runs.config(run))
    known = queue.job(job.key)
    if known is not None and known.state == "done":
        return job.key, False
    try:
        pin_job(job.checkpoint, job.key)
    except FileNotFoundError:
        raise PublicError(f"the checkpoint of step {wanted} is gone: submit another step") from None
    new = queue.submit(job.key, run=run, step=wanted, task=task, priority=priority)
    if new and (record := stored_result(job)) is not None:
        queue.finish(job.key, record)
    unpin_job(queue, runs.checkpoints(run), job.key)
    return job.key, new


class Watcher:
    """Looks for committed checkpoints and queues the tasks of their recipes, each checkpoint once."""

    def __init__(self, queue: Queue, runs: Runs) -> None:
        self._queue, self._runs = queue, runs
        self._seen: set[tuple[str, int, int]] = set()

    def look(self) -> int:
        """Queue what is new and return how many jobs that were; a run that cannot be read is logged.

        Pins are put right first: a service that was killed may have left jobs without one.
        """
        sync_pins(self._queue, {run: self._runs.checkpoints(run) for run in self._runs.ids()})
        added = 0
        for run in self._runs.ids():
            try:
                added += self._look_at(run)
            except (ValueError, OSError) as error:
                _log.warning("run %s is passed over: %s", run, error)
        return added

    def _look_at(self, run: str) -> int:
        added = 0
        for step, path in sorted(self._runs.steps(run).items()):
            mark = (run, step, (path / "manifest.json").stat().st_mtime_ns)
            if mark in self._seen:
                continue
            for task in self._runs.config(run).tasks:
                added += submit(self._queue, self._runs, run, task, step=step)[1]
            self._seen.add(mark)
        return added
