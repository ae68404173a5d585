"""The jobs that committed checkpoints, and the models beside the runs, ask for."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from checkpoints.manifest import MANIFEST_FILE
from evals.baselines import ID, Baselines
from evals.evaluate import Job, job_of, log_scalars, stored_result
from evals.folders import PublicError, Runs, state_at
from evals.pins import pin_job, sync_pins, unpin_job, unpin_unqueued
from evals.places import NO_STEP, Place
from evals.queue import Queue, QueueFullError
from evals.sharing import adopt, finish, give_finished, note_place, supersede
from evals.tasks.registry import get_task

__all__ = ["MAX_QUEUE", "PublicError", "Runs", "Watcher", "submit"]

# Jobs that may wait or run at a time; more are refused until some are done.
MAX_QUEUE = 10_000
# Seconds after which a run that could not be read is tried again although nothing in it changed.
RETRY = 60.0
NAMES = (
    "runs and baselines are folders, no links, named with at most 128 letters, digits, dots, dashes and "
    "underscores"
)
# Errors that say nothing of the run at which they come.
_OF_THE_QUEUE = (QueueFullError, sqlite3.OperationalError)
_log = logging.getLogger(__name__)


def submit(
    queue: Queue,
    runs: Runs,
    run: str,
    task: str,
    *,
    step: int | None = None,
    priority: int = 0,
    again: bool = True,
) -> tuple[str, bool]:
    """Queue one task on a committed checkpoint (the newest when ``step`` is None).

    The checkpoint is pinned until the job is over. A result that the run folder holds already is taken over
    instead of being made again. One that an equal checkpoint of another run has counts for this one too, and
    comes into its folder. What was scored on checkpoints that this one shows to be gone counts no more.

    Args:
        queue, runs: of the service.
        run, task, step: what to score.
        priority: higher ones are leased first.
        again: also when the job failed or was cancelled.

    Returns:
        The job's key, and whether it is new to the queue.

    Raises:
        PublicError: unknown run or step, or a step of a baseline, which has none.
        QueueFullError: `MAX_QUEUE` jobs wait.
        ValueError, OSError: unknown task, or a run whose recipe or data set cannot be used.
    """
    if (baselines := runs.baseline(run)) is not None:
        return _submit_baseline(queue, baselines, run, task, step=step, priority=priority, again=again)
    wanted_task, steps = get_task(task), runs.steps(run)
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise PublicError(f"run {run} has no committed checkpoint of step {step}: it has {have}")
    job = job_of(runs.folder(run), steps[wanted], wanted_task, runs.config(run))
    tokens, identity = state_at(job.checkpoint)
    place = Place(
        run=run, step=wanted, task=task, key=job.key, digest=job.digest, identity=identity, tokens=tokens
    )
    supersede(queue, runs, place)
    known = queue.job(job.key)
    if known is not None and (known.state == "done" or not again):
        note_place(queue, job, place, done=known.state == "done")
        return job.key, False
    if known is None or not known.active:
        _pin(job)
    try:
        new = queue.submit(
            job.key,
            run=run,
            step=wanted,
            task=task,
            priority=priority,
            tokens=tokens,
            digest=job.digest,
            identity=identity,
            room=MAX_QUEUE,
        )
    except Exception:
        unpin_unqueued(queue, job.checkpoint, job.key)
        raise
    if new:  # until then, whoever looked found a job that was over, or none, and may have let go of it
        with suppress(FileNotFoundError):  # its worker will say so
            pin_job(job.checkpoint, job.key)
    if new and (record := stored_result(job)) is not None:
        log_scalars(job, record)
        finish(queue, runs, job.key, record)
    if not new:
        give_finished(queue, job)
    unpin_job(queue, runs.checkpoints(run), job.key)
    return job.key, new


def _submit_baseline(
    queue: Queue,
    baselines: Baselines,
    name: str,
    task: str,
    *,
    step: int | None,
    priority: int,
    again: bool,
) -> tuple[str, bool]:
    """As `submit`; a model folder is not pinned, and what was scored on other files than its own goes."""
    if step not in (None, NO_STEP):
        raise PublicError(f"{name} is a baseline, which has no steps: submit it without one")
    if not get_task(task).suits(baselines.config, run=False):
        raise PublicError(f"{task} scores a run, and {name} is a baseline: submit another task")
    place = baselines.place(name, task)
    if stale := [one for one in queue.doubted(place) if one.step == NO_STEP]:
        queue.forget(stale)
    known = queue.job(place.key)
    if known is not None and (known.state == "done" or not again):
        queue.note(place)
        return place.key, False
    new = queue.submit(
        place.key, run=name, step=NO_STEP, task=task, priority=priority, digest=place.digest, room=MAX_QUEUE
    )
    return place.key, new


def _pin(job: Job) -> None:
    try:
        pin_job(job.checkpoint, job.key)
    except FileNotFoundError:
        raise PublicError(f"the checkpoint of step {job.step} is gone: submit another step") from None


class Watcher:
    """Looks for committed checkpoints and queues the tasks of their recipes, each checkpoint once.

    What was seen is known by the times of its manifest and of the recipe: nothing is read or hashed again.

    Args:
        queue, runs: of the service.
        clock: seconds that only grow; tests pass their own.
    """

    def __init__(self, queue: Queue, runs: Runs, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._runs, self._clock = queue, runs, clock
        self._seen: dict[str, dict[int, object]] = {}
        self._broken: dict[str, tuple[object, float]] = {}
        self._passed_over: dict[str, list[str]] = {}
        self._said: dict[str, str] = {}
        self._adopted: set[str] = set()
        self._added = 0

    def look(self) -> int:
        """Queue what is new and return how many jobs that were; a run that cannot be read is logged once.

        Pins are put right first: a service that was killed may have left jobs without one.
        """
        ids = self._runs.ids()
        sync_pins(self._queue, {run: self._runs.checkpoints(run) for run in ids}, warn=self._warn)
        for path in self._runs.shadowed():
            self._warn(str(path), f"{path} is passed over: another folder has a run of that id; rename one")
        for path in self._runs.refused():
            why = "a link" if ID.fullmatch(path.name) else "a name that clients cannot send"
            self._warn(str(path), f"{str(path)!r} is passed over: {why}; {NAMES}")
        ids += self._runs.baseline_ids()
        self._seen = {run: self._seen.get(run, {}) for run in ids}
        self._passed_over = {run: self._passed_over.get(run, []) for run in ids}
        self._adopted &= set(ids)
        self._added = 0
        for run in ids:
            try:
                self._look_at(run)
            except QueueFullError as error:
                self._warn("queue", f"the rest of the checkpoints waits: {error}")
                break
        return self._added

    def _look_at(self, run: str) -> None:
        """A run of which anything was passed over is left alone until it changes, or for `RETRY` seconds."""
        mark: object = None
        try:
            marks = self._marks(run)
            mark = sorted(marks.items(), key=str)
            known, retry = self._broken.get(run, (None, 0.0))
            if known == mark and self._clock() < retry:
                return
            problems = self._queue_new(run, marks)
        except _OF_THE_QUEUE:
            raise
        except Exception as error:  # whatever a run folder holds, the other runs are looked at
            problems = [f"run {run} is passed over: {_said_by(error)}"]
        self._broken.pop(run, None)
        if problems:
            self._broken[run] = (mark, self._clock() + RETRY)
        for text in problems:
            if text not in self._passed_over.get(run, ()):
                _log.warning("%s", text)
        self._passed_over[run] = problems

    def _marks(self, run: str) -> dict[int, object]:
        """By step what changes when there is something new to queue."""
        if (baselines := self._runs.baseline(run)) is not None:
            return {NO_STEP: baselines.mark(run)}
        recipe = (self._runs.folder(run) / "recipe.json").stat().st_mtime_ns
        steps = self._runs.steps(run)
        return {step: (recipe, (path / MANIFEST_FILE).stat().st_mtime_ns) for step, path in steps.items()}

    def _queue_new(self, run: str, marks: Mapping[int, object]) -> list[str]:
        """Queue what is new; what cannot be queued is passed over, and said in one line for each reason."""
        seen, failed = self._seen[run], dict[str, list[str]]()
        if run not in self._adopted and self._runs.is_run(run):
            adopt(self._queue, self._runs, run)
            self._adopted.add(run)
        for step in sorted(marks):
            if seen.get(step) == marks[step]:
                continue
            well = True
            for task in self._runs.config(run).tasks:
                try:
                    self._added += submit(self._queue, self._runs, run, task, step=step, again=False)[1]
                except _OF_THE_QUEUE:
                    raise
                except Exception as error:  # one checkpoint or task that is broken blocks no other
                    well = False
                    failed.setdefault(_said_by(error), []).append(_named(step, task))
            if well:
                seen[step] = marks[step]
        self._seen[run] = {step: mark for step, mark in seen.items() if step in marks}
        return [_passed_over(run, places, reason) for reason, places in failed.items()]

    def _warn(self, topic: str, text: str) -> None:
        """Log what is wrong once, and again when it is something else."""
        if self._said.get(topic) != text:
            _log.warning("%s", text)
        self._said[topic] = text


def _said_by(error: Exception) -> str:
    """Its text; other errors than those that explain themselves are named too."""
    explained = isinstance(error, (ValueError, OSError))
    return str(error) if explained else f"{type(error).__name__}: {error}"


def _named(step: int, task: str) -> str:
    return f"task {task}" if step == NO_STEP else f"step {step}, task {task}"


def _passed_over(run: str, places: list[str], reason: str) -> str:
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"run {run}: {places[0]}{more} is passed over: {reason}"
