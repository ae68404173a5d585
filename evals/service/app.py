"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from evals.counters import Counters
from evals.folders import Runs
from evals.guard import LOOPBACK, Guard
from evals.queue import Queue
from evals.results import Results
from evals.service.background import Background
from evals.worker import LocalJobs

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

__all__ = ["create_app"]

VERSION = "1"


def create_app(
    queue: Queue,
    runs: Runs,
    *,
    token: str | None = None,
    secret: str | None = None,
    background: Background | None = None,
    web: Path | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        queue, runs: what it serves.
        token: clients need it when set.
        secret: workers on other machines need it; None: there are none.
        background: started and stopped with the application.
        web: folder of the page's files; None takes the package's own.
    """
    from fastapi import Depends, FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.security import HTTPBearer

    from evals.service.internal import internal_router
    from evals.service.jobs import jobs_router
    from evals.service.metrics import metrics_router
    from evals.service.page import WEB, page_router
    from evals.service.parameters import COMMON, only_known
    from evals.service.scores import scores_router

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with background or contextlib.nullcontext():
            yield

    counters = Counters()
    # The interactive documentation would load its assets from the network.
    app = FastAPI(
        title="Trellis evaluations", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.add_middleware(Guard, hosts=LOOPBACK, token=token, secret=secret, counters=counters)
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    # The guard asks for the token; this says so in the OpenAPI document.
    needed = [Depends(only_known), *([Depends(HTTPBearer(auto_error=False))] if token else [])]
    workers = background.workers if background else lambda: 0
    for router in (
        jobs_router(queue, runs),
        scores_router(Results(queue.database)),
        metrics_router(queue, counters, workers),
    ):
        app.include_router(router, dependencies=needed, responses=COMMON)
    app.include_router(internal_router(LocalJobs(queue, runs)))
    app.include_router(page_router(WEB if web is None else web))
    return app


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Where and why, but not what was sent: it may hold what JSON cannot."""
    from fastapi.responses import JSONResponse

    detail = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)
