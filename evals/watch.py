"""Runs below the served folders, by id, and the jobs that their committed checkpoints ask for."""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.commit import list_steps
from checkpoints.manifest import MANIFEST_FILE
from checkpoints.state import load_run_state
from evals.config import EvalConfig
from evals.evaluate import Job, job_of, log_scalars, stored_result
from evals.pins import pin_job, sync_pins, unpin_job, unpin_unqueued
from evals.places import Place
from evals.queue import Queue, QueueFullError
from evals.runs import read_recipe
from evals.sharing import finish, give_stored, supersede
from evals.tasks.registry import get_task
from trellis_dist.files import digest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["MAX_QUEUE", "PublicError", "Runs", "Watcher", "submit"]

# Jobs that may wait or run at a time; more are refused until some are done.
MAX_QUEUE = 10_000
# Seconds after which a run that could not be read is tried again although nothing in it changed.
RETRY = 60.0
NAMES = "a run is a folder, no link, named with at most 128 letters, digits, dots, dashes and underscores"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Errors that say nothing of the run at which they come.
_OF_THE_QUEUE = (QueueFullError, sqlite3.OperationalError)
# Of a checkpoint's run state (trellis_dist.training.state), by section.
_LASTING = {
    "data": ("fingerprint", "sequence_length", "seed"),
    "model": ("vocab_size", "num_layers", "dim", "num_heads"),
    "init_from": ("manifest_sha256",),
}
_log = logging.getLogger(__name__)


class PublicError(ValueError):
    """A refusal whose text names ids and nothing of this machine, so that a client may read it."""


class Runs:
    """The run folders directly below each of ``roots``; a client names one by its folder name alone.

    A run whose id an earlier root has too is not served.

    Raises:
        ValueError: a root is no folder, or two of them hold runs of one id.
    """

    def __init__(self, *roots: Path) -> None:
        assert roots, "no folder to serve"
        for root in roots:
            if not root.is_dir():
                raise ValueError(f"{root} is no folder: name the one that holds the run folders")
        self.roots = tuple(dict.fromkeys(root.resolve() for root in roots))
        if shadowed := self.shadowed():
            raise ValueError(f"{shadowed[0]} has the id of a run in another folder: rename one of the two")

    def ids(self) -> list[str]:
        """Ids of all runs, sorted."""
        return sorted({path.name for path in self._all()})

    def shadowed(self) -> list[Path]:
        """Run folders that are not served because an earlier root has a run of their id."""
        return [path for path in self._all() if self.folder(path.name) != path]

    def folder(self, run: str) -> Path:
        """The folder of a run id. Raises PublicError for anything that is none, paths included."""
        if _ID.fullmatch(run):
            for root in self.roots:
                if self._is_run(root / run):
                    return root / run
        raise PublicError(f"there is no run {run[:128]!r}: GET /runs lists them")

    def _all(self) -> list[Path]:
        return [path for root in self.roots for path in root.iterdir() if self._is_run(path)]

    def _is_run(self, path: Path) -> bool:
        """A real folder of its root (no link out of it) with a recipe."""
        return bool(_ID.fullmatch(path.name)) and _has_recipe(path, link=False)

    def refused(self) -> list[Path]:
        """What would be a run but for its name, which no client could send, or because it is a link."""
        found = [path for root in self.roots for path in root.iterdir()]
        bad_names = [path for path in found if not _ID.fullmatch(path.name) and _has_recipe(path, link=False)]
        return bad_names + [path for path in found if _has_recipe(path, link=True)]

    def config(self, run: str) -> EvalConfig:
        """The evals section of the run's own recipe; clients cannot send settings."""
        return _parser().validate_python(read_recipe(self.folder(run)).get("evals", {}))

    def steps(self, run: str) -> dict[int, Path]:
        """Committed checkpoints by step; one that is being removed has lost its manifest and is not there."""
        found = list_steps(self.checkpoints(run))
        return {step: path for step, path in found.items() if (path / MANIFEST_FILE).is_file()}

    def tokens(self, run: str) -> dict[int, int]:
        """Training tokens by step, where the checkpoint says so."""
        known = {step: _state_at(path)[0] for step, path in self.steps(run).items()}
        return {step: tokens for step, tokens in known.items() if tokens is not None}

    def checkpoints(self, run: str) -> Path:
        """The folder of a run's checkpoints."""
        return self.folder(run) / "checkpoints"


def _has_recipe(path: Path, *, link: bool) -> bool:
    """Whether a folder, or a link to one, has a recipe; one that cannot be read has none."""
    try:
        return path.is_symlink() == link and (path / "recipe.json").is_file()
    except OSError:  # no permission, or a file system that went: it must not take the other runs along
        return False


@lru_cache(maxsize=1)
def _parser() -> TypeAdapter[EvalConfig]:
    from pydantic import TypeAdapter

    return TypeAdapter(EvalConfig)


def _state_at(checkpoint: Path) -> tuple[int | None, str | None]:
    """Tokens and identity of a checkpoint."""
    try:
        return _state(checkpoint, (checkpoint / MANIFEST_FILE).stat().st_mtime_ns)
    except (OSError, ValueError):
        return None, None  # gone or damaged: whoever scores it says so


@lru_cache(maxsize=8192)
def _state(checkpoint: Path, modified: int) -> tuple[int | None, str | None]:
    """What its run state says; ``modified`` tells a later checkpoint of the same name apart."""
    state = load_run_state(checkpoint)
    tokens = state.get("tokens")
    return (tokens if isinstance(tokens, int) else None), _identity(state)


def _identity(state: Mapping[str, Any]) -> str | None:
    """What training refuses to change between two starts of a run, of states of every version.

    A difference is a run trained anew under the same name; the same may be one too, with the same seed.
    """
    if not isinstance(state.get("data"), dict):
        return None
    parts: dict[str, Any] = {}
    for section, names in _LASTING.items():
        found = state.get(section)
        parts[section] = {name: found.get(name) for name in names} if isinstance(found, dict) else None
    return digest(parts)


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
        PublicError: unknown run or step.
        QueueFullError: `MAX_QUEUE` jobs wait.
        ValueError, OSError: unknown task, or a run whose recipe or data set cannot be used.
    """
    wanted_task, steps = get_task(task), runs.steps(run)
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise PublicError(f"run {run} has no committed checkpoint of step {step}: it has {have}")
    job = job_of(runs.folder(run), steps[wanted], wanted_task, runs.config(run))
    tokens, identity = _state_at(job.checkpoint)
    place = Place(
        run=run, step=wanted, task=task, key=job.key, digest=job.digest, identity=identity, tokens=tokens
    )
    supersede(queue, runs, place)
    known = queue.job(job.key)
    if known is not None and (known.state == "done" or not again):
        if known.state == "done":
            give_stored(queue, job, place)
        queue.note(place)
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
    unpin_job(queue, runs.checkpoints(run), job.key)
    return job.key, new


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
        self._seen: dict[str, dict[int, tuple[int, int]]] = {}
        self._broken: dict[str, tuple[object, float]] = {}
        self._passed_over: dict[str, list[str]] = {}
        self._said: dict[str, str] = {}
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
            why = "a link" if _ID.fullmatch(path.name) else "a name that clients cannot send"
            self._warn(str(path), f"{str(path)!r} is passed over: {why}; {NAMES}")
        self._seen = {run: self._seen.get(run, {}) for run in ids}
        self._passed_over = {run: self._passed_over.get(run, []) for run in ids}
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
            mark = sorted(marks.items())
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

    def _marks(self, run: str) -> dict[int, tuple[int, int]]:
        recipe = (self._runs.folder(run) / "recipe.json").stat().st_mtime_ns
        steps = self._runs.steps(run)
        return {step: (recipe, (path / MANIFEST_FILE).stat().st_mtime_ns) for step, path in steps.items()}

    def _queue_new(self, run: str, marks: dict[int, tuple[int, int]]) -> list[str]:
        """Queue what is new; what cannot be queued is passed over, and said in one line for each reason."""
        seen, failed = self._seen[run], dict[str, list[str]]()
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
                    failed.setdefault(_said_by(error), []).append(f"step {step}, task {task}")
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


def _passed_over(run: str, places: list[str], reason: str) -> str:
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"run {run}: {places[0]}{more} is passed over: {reason}"
