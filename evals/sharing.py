"""What the run folders get and lose by the places of a key: records, points in TensorBoard, pins.

A result is scored in one run folder and kept in all that have its checkpoint. A run that was rolled back, or
trained anew under its name, loses what was scored on checkpoints that its folder no longer has.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.commit import step_name
from checkpoints.manifest import MANIFEST_FILE
from checkpoints.pins import unpin
from evals.curves import events_file
from evals.evaluate import Job, keep_copy, log_scalars, record_file, recorded_key, stored_result
from evals.pins import PREFIX, pin_job
from evals.places import NO_STEP, Place
from evals.queue import Queue, QueuedJob
from evals.results import Results
from evals.runs import checkpoint_digest

if TYPE_CHECKING:
    from evals.folders import Runs

__all__ = ["SUPERSEDED", "adopt", "finish", "give_finished", "note_place", "settle", "supersede"]

# Appended to the name of a record of an earlier training.
SUPERSEDED = ".superseded"
_log = logging.getLogger(__name__)


def supersede(queue: Queue, runs: Runs, place: Place) -> None:
    """Drop what an earlier training of the run left, now that ``place`` shows another digest or identity.

    That are places whose checkpoint on disk no longer has the digest they were made with; results stay.
    Their points leave the run's TensorBoard folder, and their records get another name.
    """
    suspects = queue.doubted(place)
    if not suspects:
        return
    steps = runs.steps(place.run)
    stale = [one for one in suspects if not _is_there(steps.get(one.step), one)]
    for one in stale:  # before the rows: a service that is killed here does it again
        _clear(runs.folder(place.run), one)
    if stale:
        queue.forget(stale)
        mine = [one for one in stale if one.step != NO_STEP]
        for one in mine:
            with suppress(OSError):  # pins run out
                unpin(runs.checkpoints(place.run) / step_name(one.step), PREFIX + one.key)
        if found := ", ".join(str(step) for step in sorted({one.step for one in mine})):
            _log.warning(
                "run %s was trained anew: its curves lose what was scored at step %s", place.run, found
            )


def _is_there(checkpoint: Path | None, place: Place) -> bool:
    return checkpoint is not None and place.digest in (None, _digest_at(checkpoint))


def _digest_at(checkpoint: Path) -> str | None:
    """The digest of a checkpoint, None when it is gone; each manifest is read once.

    Raises:
        OSError: it cannot be read, which says nothing of what it is.
    """
    try:
        status = (checkpoint / MANIFEST_FILE).stat()
        return _digest(checkpoint, status.st_mtime_ns, status.st_ino)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=8192)
def _digest(checkpoint: Path, modified: int, inode: int) -> str:
    return checkpoint_digest(checkpoint)


def _clear(run_dir: Path, place: Place) -> None:
    """Take a place's files away, unless they are of another result by now."""
    if recorded_key(run_dir, task=place.task, step=place.step) not in (None, place.key):
        return
    record = record_file(run_dir, place.task, place.step)
    try:
        events_file(run_dir, place.task, place.step).unlink(missing_ok=True)
        if record.is_file():
            record.replace(record.with_name(record.name + SUPERSEDED))
    except OSError as error:
        _log.warning("%s keeps points of an earlier training: %s", run_dir, error)


def adopt(queue: Queue, runs: Runs, run: str) -> None:
    """Have a run that is new to the queue show its records of checkpoints that it no longer has.

    A renamed run brings them, and a whole copy: what was scored under another name before retention came. A
    record without a result in the database is left alone; of a step with a checkpoint `submit` knows more.

    Raises:
        OSError: a record cannot be read.
    """
    if queue.knows(run):
        return
    folder, steps = runs.folder(run), runs.steps(run)
    found = []
    for path in sorted((folder / "evals").glob("*-step-*.json")):
        task, _, number = path.stem.rpartition("-step-")
        if not number.isdecimal() or int(number) in steps:
            continue
        if (key := recorded_key(folder, task=task, step=int(number))) is not None:
            found.append(Place(run=run, step=int(number), task=task, key=key))
    if found:
        queue.adopt(found)


def note_place(queue: Queue, job: Job, place: Place, *, done: bool) -> None:
    """Keep a place of a key that is there; if that is ``done``, the run folder holds the result.

    Raises:
        OSError: the folder cannot be written; the result counts there all the same.
    """
    if queue.is_noted(place) and (not done or job.path.is_file()):
        return
    try:
        if done:  # before the row: a service that is killed here does it again
            _give(queue, job)
    finally:
        queue.note(place)
    if not done:
        give_finished(queue, job)


def give_finished(queue: Queue, job: Job) -> None:
    """Give the result to a place that came while its job ended: who stored it need not have seen the place.

    Raises:
        OSError: the folder cannot be written.
    """
    known = queue.job(job.key)
    if known is not None and known.state == "done":
        _give(queue, job)


def _give(queue: Queue, job: Job) -> None:
    """Have the run folder hold the result, as if it had been scored there."""
    if (record := stored_result(job)) is not None:
        log_scalars(job, record)
    elif (record := Results(queue.database).whole(job.key)) is not None:
        keep_copy(job.run_dir, record, task=job.task, step=job.step)


def finish(
    queue: Queue, runs: Runs, key: str, record: Mapping[str, Any], *, leased: QueuedJob | None = None
) -> bool:
    """As `Queue.finish`, and the record goes to the run folders of all places of the key.

    Where it was ``leased`` for, its worker has put it already: it goes if that is no place of the key by now.
    """
    job = queue.job(key)
    served: set[Place] = set()
    if job is not None and job.active:  # before the queue has it: a service that is killed here does it again
        _share(queue, runs, key, record, served)
    stored = queue.finish(key, record)
    if stored:
        _share(queue, runs, key, record, served)  # places that came meanwhile
    if leased is not None:
        _take_back(queue, runs, leased)
    return stored


def _share(queue: Queue, runs: Runs, key: str, record: Mapping[str, Any], served: set[Place]) -> None:
    for place in queue.places(key):
        if place not in served and place.step != NO_STEP:  # the folder of a baseline is only read
            served.add(place)
            _serve(runs, place, record)


def _serve(runs: Runs, place: Place, record: Mapping[str, Any]) -> None:
    """Give a record to one place; a run or a checkpoint that went is no error."""
    try:
        folder, checkpoint = runs.folder(place.run), runs.steps(place.run).get(place.step)
        if checkpoint is not None and not _is_there(checkpoint, place):
            return  # trained anew: the next look finds it
        if recorded_key(folder, task=place.task, step=place.step) != place.key:
            keep_copy(folder, record, task=place.task, step=place.step)
    except ValueError:
        return
    except OSError as error:
        _log.warning("run %s does not get the result of %s: %s", place.run, place.task, error)


def _take_back(queue: Queue, runs: Runs, job: QueuedJob) -> None:
    """Clear what a job left in a run that was trained anew while it ran: `supersede` came before that."""
    if job.step == NO_STEP or (job.run, job.step) in [(one.run, one.step) for one in queue.places(job.key)]:
        return
    with suppress(ValueError, OSError):  # the run went, or cannot be read: then it shows nothing either
        _clear(runs.folder(job.run), Place(run=job.run, step=job.step, task=job.task, key=job.key))


def settle(queue: Queue, runs: Runs, job: QueuedJob) -> QueuedJob:
    """A leased job, at a place whose checkpoint is there and pinned; unchanged where there is none."""
    own = (job.run, job.step)
    for place in sorted(queue.places(job.key), key=lambda one: (one.run, one.step) != own):
        checkpoint = _checkpoint(runs, place)
        if checkpoint is None:
            continue
        if (place.run, place.step) == own:
            return job
        with suppress(OSError):  # its worker will say so
            pin_job(checkpoint, job.key)
            queue.move(job.key, place.run, place.step)
            pin_job(checkpoint, job.key)  # whoever looked before it was moved let go of it
            return dataclasses.replace(job, run=place.run, step=place.step)
    return job


def _checkpoint(runs: Runs, place: Place) -> Path | None:
    """The checkpoint of a place if it is there; one that cannot be read is not: its worker will say so."""
    try:
        checkpoint = runs.steps(place.run).get(place.step)
        return checkpoint if _is_there(checkpoint, place) else None
    except (ValueError, OSError):
        return None
