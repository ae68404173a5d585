"""What workers on other machines ask for. The guard in front lets nobody in without the workers' secret."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from evals.guard import INTERNAL
from evals.service.models import FailRequest, FinishRequest, LeaseRequest, RenewRequest
from evals.worker import LocalJobs

__all__ = ["internal_router"]


def internal_router(jobs: LocalJobs) -> APIRouter:
    """POST lease, renew, finish and fail: `evals.remote.RemoteJobs` is the other side."""
    router = APIRouter(prefix=INTERNAL.rstrip("/"), include_in_schema=False)

    @router.post("/lease")
    def lease(wanted: LeaseRequest) -> dict[str, Any]:
        job = jobs.lease(wanted.owner, seconds=wanted.seconds)
        return {"job": job.to_json() if job else None}

    @router.post("/renew")
    def renew(wanted: RenewRequest) -> dict[str, Any]:
        return {"held": jobs.renew(wanted.key, wanted.owner, seconds=wanted.seconds)}

    @router.post("/finish")
    def finish(wanted: FinishRequest) -> dict[str, Any]:
        return {"stored": jobs.finish(wanted.key, wanted.record)}

    @router.post("/fail")
    def fail(wanted: FailRequest) -> dict[str, Any]:
        jobs.fail(wanted.key, wanted.owner, wanted.error)
        return {}

    return router
