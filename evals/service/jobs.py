"""Endpoints of the queue and of what can be queued."""

from __future__ import annotations

import contextlib
import logging

from fastapi import APIRouter, HTTPException

from evals.config import TaskName
from evals.folders import PublicError, Runs
from evals.pins import unpin_job
from evals.queue import Queue, QueueFullError, State
from evals.service.models import (
    Cancelled,
    Health,
    JobEntry,
    JobPage,
    RunList,
    RunSteps,
    Submission,
    Submitted,
)
from evals.service.parameters import KeyPath, Limit, Offset, RunFilter, problem
from evals.tasks.registry import TASKS
from evals.watch import submit

__all__ = ["jobs_router"]

_log = logging.getLogger(__name__)


def jobs_router(queue: Queue, runs: Runs) -> APIRouter:
    """GET /health, GET /runs, POST and GET /jobs, GET and DELETE /jobs/{key}."""
    router = APIRouter()

    @router.get("/health")
    def health() -> Health:
        counts, events = queue.counts(), queue.events()
        return Health(status="ok", jobs=counts, results=queue.scored(), counters=events)  # type: ignore[arg-type]

    @router.get("/runs")
    def list_runs() -> RunList:
        found = {}
        for run in runs.ids():
            with contextlib.suppress(PublicError, OSError):  # one that just went, or cannot be read
                found[run] = RunSteps(steps=sorted(runs.steps(run)), tokens=runs.tokens(run))
        return RunList(runs=found, baselines=runs.baseline_ids(), tasks=sorted(TASKS))

    @router.post(
        "/jobs",
        status_code=202,
        responses=problem(404, "no such run or checkpoint") | problem(429, "the queue is full"),
    )
    def add_job(wanted: Submission) -> Submitted:
        key, new = _submit(queue, runs, wanted)
        return Submitted(key=key, new=new)

    @router.get("/jobs")
    def list_jobs(
        state: State | None = None,
        run: RunFilter = None,
        task: TaskName | None = None,
        limit: Limit = 100,
        offset: Offset = 0,
    ) -> JobPage:
        found, total = queue.jobs(state=state, run=run, task=task, limit=limit, offset=offset)
        return JobPage(jobs=[JobEntry(**job.to_json()) for job in found], total=total)

    @router.get("/jobs/{key}", responses=problem(404, "no such job"))
    def show_job(key: KeyPath) -> JobEntry:
        job = queue.job(key)
        if job is None:
            raise HTTPException(404, "there is no job of that key")
        return JobEntry(**job.to_json())

    @router.delete("/jobs/{key}", responses=problem(404, "no such job") | problem(409, "it is over already"))
    def cancel_job(key: KeyPath) -> Cancelled:
        _cancel(queue, runs, key)
        return Cancelled(key=key, state="cancelled")

    return router


def _submit(queue: Queue, runs: Runs, wanted: Submission) -> tuple[str, bool]:
    """As `submit`; raises HTTPException."""
    try:
        return submit(queue, runs, wanted.run, wanted.task, step=wanted.step, priority=wanted.priority)
    except PublicError as error:
        raise HTTPException(404, str(error)) from None
    except QueueFullError as error:
        raise HTTPException(429, str(error), headers={"Retry-After": "60"}) from None
    except (ValueError, OSError) as error:
        # Such texts name folders of this machine: they are for its owner.
        _log.warning("run %s cannot be scored: %s", wanted.run, error)
        reason = f"run {wanted.run} cannot be scored: the log of the service says why"
        raise HTTPException(404, reason) from None


def _cancel(queue: Queue, runs: Runs, key: str) -> None:
    """Cancel a job and let go of its checkpoint; raises HTTPException."""
    if not queue.cancel(key):
        if queue.job(key) is None:
            raise HTTPException(404, "there is no job of that key")
        raise HTTPException(409, "the job is over already")
    job = queue.job(key)
    with contextlib.suppress(PublicError):  # its run folder went: there is nothing to keep
        if job is not None:
            unpin_job(queue, runs.checkpoints(job.run), key)
