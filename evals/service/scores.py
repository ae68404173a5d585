"""Endpoints of what is stored: results, samples, comparisons, curves, heat maps."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

from evals.compare import compare
from evals.config import TaskName
from evals.results import Results
from evals.service.models import (
    Comparison,
    Difference,
    Heatmap,
    Record,
    ResultEntry,
    ResultPage,
    SamplePage,
    SeriesList,
)
from evals.service.parameters import (
    KeyPath,
    KeyQuery,
    Limit,
    Offset,
    RunFilter,
    SamplesLimit,
    TextFilter,
    problem,
)

__all__ = ["scores_router"]

_GONE = problem(404, "no result of that key")


def scores_router(results: Results) -> APIRouter:
    """GET /results and below, /compare, /scalars, /heatmap/{key}."""
    router = APIRouter()

    @router.get("/results")
    def list_results(
        run: RunFilter = None, task: TaskName | None = None, limit: Limit = 100, offset: Offset = 0
    ) -> ResultPage:
        found, total = results.page(run=run, task=task, limit=limit, offset=offset)
        return ResultPage(results=[ResultEntry(**row) for row in found], total=total)

    @router.get("/results/{key}", responses=_GONE)
    def show_result(key: KeyPath) -> Record:
        record = results.record(key)
        if record is None:
            raise _no_result(key)
        return Record(**record)

    @router.get("/results/{key}/samples", responses=_GONE)
    def list_samples(
        key: KeyPath,
        group: TextFilter = None,
        wrong: Annotated[bool, Query(description="only those that are not entirely right")] = False,
        search: Annotated[str, Query(max_length=256, description="in prompt, answer or output")] = "",
        depth_from: Annotated[float | None, Query(ge=0, le=1, description="at this depth or deeper")] = None,
        depth_to: Annotated[
            float | None, Query(ge=0, le=1, description="less deep; with 1, to the end")
        ] = None,
        limit: SamplesLimit = 50,
        offset: Offset = 0,
    ) -> SamplePage:
        _task(results, key)
        found, total, groups = results.samples(
            key,
            group=group,
            wrong=wrong,
            search=search,
            depths=(depth_from, depth_to),
            limit=limit,
            offset=offset,
        )
        return SamplePage(samples=found, total=total, groups=groups)  # type: ignore[arg-type]

    @router.get("/compare", responses=_GONE | problem(409, "results of different tasks"))
    def compare_results(first: KeyQuery, second: KeyQuery, group: TextFilter = None) -> Comparison:
        task, other = _task(results, first), _task(results, second)
        if task != other:
            raise HTTPException(409, f"the first result is of {task} and the second of {other}")
        pairs = results.pairs(first, second, group=group)
        groups = {name: Difference(**compare(*scores)) for name, scores in pairs.items()}  # type: ignore[arg-type]
        return Comparison(task=task, groups=groups)

    @router.get("/scalars")
    def list_scalars(run: RunFilter = None, name: TextFilter = None) -> SeriesList:
        series, total = results.series(run=run, name=name)
        thinned = sum(len(one["points"]) for one in series) < total
        return SeriesList(series=series, thinned=thinned, total=total)  # type: ignore[arg-type]

    @router.get("/heatmap/{key}", responses=_GONE)
    def show_heatmap(key: KeyPath) -> Heatmap:
        _task(results, key)
        return Heatmap(**results.heatmap(key))

    return router


def _task(results: Results, key: str) -> str:
    """The task of a result. Raises HTTPException when there is none of that key."""
    task = results.task(key)
    if task is None:
        raise _no_result(key)
    return task


def _no_result(key: str) -> HTTPException:
    return HTTPException(404, f"there is no result of key {key}")
