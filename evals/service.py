"""The evaluation service: a queue behind HTTP, its workers, and one page with the leaderboard.

It answers on loopback; any other address needs a token. Clients name runs by id and tasks by name, both from
what the service itself lists, and send no paths and no settings: those come from the run's own recipe.
"""

import contextlib
import logging
import math
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from evals.config import TaskName
from evals.guard import LOOPBACK, Guard, is_loopback
from evals.pins import unpin_job
from evals.queue import Queue
from evals.tasks.registry import TASKS
from evals.watch import PublicError, Runs, Watcher, submit
from evals.worker import WorkerPool
from trellis_dist.report import Report

__all__ = ["Submission", "create_app", "leaderboard", "serve"]

WATCH_SECONDS = 5.0
MAX_ROWS = 1000
_log = logging.getLogger(__name__)


class Submission(BaseModel):
    """One task on one checkpoint, both by name."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=128)
    task: TaskName
    step: int | None = Field(default=None, ge=0, lt=2**63)


def create_app(
    queue: Queue, runs: Runs, *, token: str | None = None, background: "Background | None" = None
) -> Any:
    """The ASGI application; ``background`` is started and stopped with it."""
    from fastapi import FastAPI, HTTPException, Query
    from fastapi.responses import HTMLResponse

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        with background or contextlib.nullcontext():
            yield

    # The interactive documentation would load its assets from the network.
    app = FastAPI(title="Trellis evaluations", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, hosts=LOOPBACK, token=token)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "jobs": queue.counts()}

    @app.get("/runs")
    def list_runs() -> dict[str, Any]:
        return {"runs": {run: sorted(runs.steps(run)) for run in runs.ids()}, "tasks": sorted(TASKS)}

    @app.get("/jobs")
    def list_jobs(limit: int = Query(100, ge=1, le=MAX_ROWS)) -> list[dict[str, Any]]:
        return [job.to_json() for job in queue.jobs(limit=limit)]

    @app.get("/results")
    def list_results(limit: int = Query(100, ge=1, le=MAX_ROWS)) -> list[dict[str, Any]]:
        return queue.results(limit=limit)

    @app.post("/jobs", status_code=202, responses={404: {"description": "no such run or checkpoint"}})
    def add_job(wanted: Submission) -> dict[str, Any]:
        try:
            key, new = submit(queue, runs, wanted.run, wanted.task, step=wanted.step, priority=1)
        except PublicError as error:
            raise HTTPException(404, str(error)) from None
        except (ValueError, OSError) as error:
            # Such texts name folders of this machine: they are for its owner.
            _log.warning("run %s cannot be scored: %s", wanted.run, error)
            raise HTTPException(
                404, f"run {wanted.run} cannot be scored: the log of the service says why"
            ) from None
        return {"key": key, "new": new}

    @app.delete("/jobs/{key}", responses={404: {"description": "no such job, or it is over"}})
    def cancel_job(key: str) -> dict[str, Any]:
        if not queue.cancel(key):
            raise HTTPException(404, "no job of that key waits or runs")
        job = queue.job(key)
        with contextlib.suppress(PublicError):  # its run folder went: there is nothing to keep
            if job is not None:
                unpin_job(queue, runs.checkpoints(job.run), key)
        return {"key": key, "state": "cancelled"}

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return leaderboard(queue)

    return app


def leaderboard(queue: Queue) -> str:
    """The page: runs by held-out bits per byte, then the queue. Everything on it is escaped."""
    report = Report("Evaluations", "Committed checkpoints, scored")
    scores: dict[tuple[str, int], dict[str, Any]] = {}
    for result in reversed(queue.results(limit=MAX_ROWS)):
        scores.setdefault((result["run"], result["step"]), {})[result["task"]] = result["record"]["result"]
    report.section("Leaderboard")
    ranked = sorted(scores.items(), key=lambda item: (_bits_per_byte(item[1]), item[0]))
    rows = [[run, step, *_cells(tasks)] for (run, step), tasks in ranked]
    header = ["run", "step", "bits per byte", "bigram", "needle, choice %", "ms per token", "state, MiB"]
    report.table(header, rows)
    report.section("Queue")
    report.facts({state: str(count) for state, count in sorted(queue.counts().items())} or {"jobs": "0"})
    jobs = queue.jobs(limit=50)
    report.table(
        ["run", "step", "task", "state", "error"],
        [[j.run, j.step, j.task, j.state, j.error or ""] for j in jobs],
    )
    return report.render()


def _bits_per_byte(tasks: Mapping[str, Any]) -> float:
    """What the leaderboard is sorted by; a checkpoint without it comes last."""
    return tasks["perplexity"]["model"]["bits_per_byte"] if "perplexity" in tasks else math.inf


def _cells(tasks: Mapping[str, Any]) -> list[str]:
    """The columns of one checkpoint; a dash where the task was not run."""
    perplexity, needle, decode = (tasks.get(name) for name in ("perplexity", "needle", "decode"))
    cells = ["-"] * 5
    if perplexity:
        cells[0] = f"{perplexity['model']['bits_per_byte']:.4f}"
        cells[1] = f"{perplexity['bigram']['bits_per_byte']:.4f}"
    if needle:
        shares = [row["choice"]["score"] for row in needle["rows"]]
        cells[2] = f"{sum(shares) / len(shares):.1f}"
    if decode:
        last = decode["model"][-1]
        cells[3], cells[4] = f"{last['ms_per_token']:.2f}", f"{last['state_bytes'] / 2**20:.2f}"
    return cells


class Background:
    """Watches the run folders and keeps the workers alive while the service runs."""

    def __init__(self, watcher: Watcher, pool: WorkerPool, *, seconds: float = WATCH_SECONDS) -> None:
        self._watcher, self._pool, self._seconds = watcher, pool, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._pool.keep_alive()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.stop()

    def _run(self) -> None:
        while True:
            try:
                self._watcher.look()
                self._pool.keep_alive()
            except Exception:
                _log.exception("looking for checkpoints failed; trying again")
            if self._stop.wait(self._seconds):
                return


def serve(
    root: Path, *, host: str = "127.0.0.1", port: int = 8321, workers: int = 1, token: str | None = None
) -> None:
    """Serve the runs below ``root`` until interrupted; the queue is ``root/evaluations.sqlite``.

    Args:
        root: folder that holds run folders.
        host: address to listen on; one that is not loopback needs a token.
        workers: worker processes.
        token: clients send it as ``Authorization: Bearer <token>``.

    Raises:
        ValueError: no such folder, or another address than loopback without a token.
    """
    import uvicorn

    if not is_loopback(host) and not token:
        raise ValueError(f"host = {host}: an address others can reach needs a token (or use 127.0.0.1)")
    if workers < 1:
        raise ValueError(f"workers = {workers}: use 1 or more")
    token = token or None  # an empty variable is no token
    runs, database = Runs(root), root / "evaluations.sqlite"
    queue = Queue(database)
    background = Background(Watcher(queue, runs), WorkerPool(database, root, count=workers))
    app = create_app(queue, runs, token=token, background=background)
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=64, timeout_keep_alive=5)
