"""GET /metrics: what a Prometheus server reads."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Response

from evals.counters import Counters, Labels, Metric, render
from evals.queue import Queue

__all__ = ["metrics_router"]


def metrics_router(queue: Queue, counters: Counters, workers: Callable[[], int]) -> APIRouter:
    """Jobs by state, events of the queue, answers by status, workers that run."""
    router = APIRouter()

    @router.get(
        "/metrics",
        response_class=Response,  # of no type of its own: refusals are documented as JSON
        responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}},
    )
    def metrics() -> Response:
        jobs: dict[Labels, float] = {(("state", name),): n for name, n in queue.counts().items()}
        events: dict[Labels, float] = {(("event", name),): n for name, n in queue.events().items()}
        found: list[Metric] = [
            ("trellis_eval_jobs", "jobs of the queue", "gauge", jobs),
            ("trellis_eval_events_total", "what happened since the queue was made", "counter", events),
            (
                "trellis_eval_requests_total",
                "answers since the start",
                "counter",
                counters.values("requests"),
            ),
            ("trellis_eval_workers", "workers that run", "gauge", {(): float(workers())}),
        ]
        return Response(render(found), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
