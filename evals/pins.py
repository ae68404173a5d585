"""Checkpoints stay while their evaluation waits or runs: one pin per job that is not over.

A pin comes before its job and goes after it, so a service that is killed in between leaves a pin too many,
never one too few; `sync_pins` puts both right, at the start and at every look for new checkpoints.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from checkpoints.commit import step_name
from checkpoints.pins import Pin, list_pins, pin, unpin
from evals.queue import Queue

__all__ = ["pin_job", "sync_pins", "unpin_job", "unpin_unqueued"]

PREFIX = "evaluation "
REFRESH = 24 * 3600.0  # seconds; a pin that is younger is not written again
_log = logging.getLogger(__name__)


def _warn(topic: str, text: str) -> None:
    _log.warning("%s", text)


def pin_job(checkpoint: Path, key: str) -> None:
    """Keep `checkpoint` for the job `key`. Raises FileNotFoundError when it went, and other OSErrors."""
    pin(checkpoint, PREFIX + key)


def unpin_job(queue: Queue, root: Path, key: str) -> None:
    """Let go of the checkpoint of the job `key` if the job is over; what fails is logged: pins run out.

    Args:
        queue: holds the job.
        root: the folder of its run's checkpoints.
        key: of the job.
    """
    job = queue.job(key)
    if job is None or job.active:
        return
    try:
        unpin(root / step_name(job.step), PREFIX + key)
    except OSError as error:
        _log.warning("step %d of run %s stays pinned: %s", job.step, job.run, error)


def unpin_unqueued(queue: Queue, checkpoint: Path, key: str) -> None:
    """Let go of `checkpoint` when the job `key` could not be queued; what fails is logged: pins run out.

    Another submission of the same job may have come through meanwhile: that one keeps its pin.
    """
    try:
        job = queue.job(key)
        if job is None or not job.active:
            unpin(checkpoint, PREFIX + key)
    except (OSError, sqlite3.Error) as error:
        _log.warning("%s stays pinned: %s", checkpoint, error)


def sync_pins(queue: Queue, roots: Mapping[str, Path], *, warn: Callable[[str, str], None] = _warn) -> None:
    """Pin what waits or runs, and let go of what is over.

    Args:
        queue: whose jobs count. A pin of a job that it does not know is another queue's.
        roots: run -> folder of its checkpoints.
        warn: gets a topic and what is wrong with it, each time that this is found.
    """
    waiting: dict[str, dict[str, int]] = {run: {} for run in roots}
    for job in queue.active():
        waiting.get(job.run, {})[job.key] = job.step
    for run, root in roots.items():
        try:
            _sync_run(queue, run, root, waiting[run])
        except OSError as error:
            warn(f"pins of {run}", f"the pins of run {run} cannot be read: {error}")


def _sync_run(queue: Queue, run: str, root: Path, waiting: Mapping[str, int]) -> None:
    pins = {item.owner[len(PREFIX) :]: item for item in list_pins(root) if item.owner.startswith(PREFIX)}
    for key, step in waiting.items():
        _refresh(root / step_name(step), key, pins.get(key))
    for key in pins.keys() - waiting.keys():
        job = queue.job(key)
        # Of several runs with its checkpoint a job keeps the one that it will be done in.
        if job is not None and not (job.active and job.run == run):
            unpin(root / step_name(pins[key].step), PREFIX + key)


def _refresh(checkpoint: Path, key: str, present: Pin | None) -> None:
    """Pin for a job, unless that was done not long ago. A checkpoint that went is its worker's to report."""
    if present is not None and time.time() - present.time < REFRESH:
        return
    try:
        pin_job(checkpoint, key)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("%s is not pinned: %s", checkpoint, error)
