"""Parameters and refusals that several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query, Request
from fastapi.exceptions import RequestValidationError

from evals.service.models import Invalid, Problem

__all__ = [
    "COMMON",
    "KeyPath",
    "KeyQuery",
    "Limit",
    "Offset",
    "RunFilter",
    "SamplesLimit",
    "TextFilter",
    "only_known",
    "problem",
]

MAX_ROWS = 1000
MAX_SAMPLES = 200
_KEY = r"^[A-Za-z0-9_-]+$"

KeyPath = Annotated[str, Path(min_length=1, max_length=128, pattern=_KEY)]
KeyQuery = Annotated[str, Query(min_length=1, max_length=128, pattern=_KEY)]
Limit = Annotated[int, Query(ge=1, le=MAX_ROWS, description="rows of a page")]
SamplesLimit = Annotated[int, Query(ge=1, le=MAX_SAMPLES, description="samples of a page")]
Offset = Annotated[int, Query(ge=0, lt=2**31, description="rows before the page")]
RunFilter = Annotated[str | None, Query(max_length=128, description="a run's id")]
TextFilter = Annotated[str | None, Query(max_length=256)]


def only_known(request: Request) -> None:
    """Refuse query parameters that the endpoint does not have: a misspelt filter would filter nothing.

    Raises:
        RequestValidationError: naming the first one.
    """
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    if strangers := sorted(set(request.query_params) - known):
        error = {
            "loc": ("query", strangers[0]),
            "msg": "no such parameter",
            "type": "extra_forbidden",
        }
        raise RequestValidationError([error])


def problem(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    """The documentation of a refusal."""
    return {status: {"model": Problem, "description": description}}


# What `evals.guard` and the service answer on any path.
COMMON: dict[int | str, dict[str, Any]] = {}
for _status, _words in {
    400: "the request cannot be read, or a header comes twice",
    401: "the token is missing or wrong",
    403: "sent by the page of another site",
    408: "the body did not come in time",
    413: "the body is too large",
    421: "the service does not answer to that Host",
    431: "too many headers",
    500: "the service failed",
    503: "busy, or too slow: try again after Retry-After seconds",
}.items():
    COMMON |= problem(_status, _words)
COMMON |= {422: {"model": Invalid, "description": "not as documented here"}}
