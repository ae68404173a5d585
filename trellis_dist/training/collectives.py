"""The agreements between ranks outside an engine's gradients; all on host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from trellis_dist.parallel import env
from trellis_dist.training.errors import EchoError

T = TypeVar("T")

__all__ = ["PeerFailedError", "gather_objects", "gather_scalars", "on_main", "sum_scalars", "together"]


class PeerFailedError(EchoError, ValueError):
    """Work that all ranks do together failed on another rank."""


def sum_scalars(values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum each value over the ranks of ``group`` (default: all) in fp64, in one call.

    Exact for integers below 2^53. Without a process group the values come back as they are.
    """
    if not dist.is_initialized():
        return [float(value) for value in values]
    buffer = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(buffer, group=group)
    return [float(value) for value in buffer.tolist()]


def gather_scalars(values: Sequence[float]) -> list[list[float]]:
    """The values of every rank in fp64, by rank; the same on all ranks, in one call."""
    own = torch.tensor(list(values), dtype=torch.float64)
    if not dist.is_initialized():
        return [own.tolist()]
    rows = torch.empty(env.world_size(), len(own), dtype=torch.float64)
    dist.all_gather_into_tensor(rows.view(-1), own)
    gathered: list[list[float]] = rows.tolist()
    return gathered


def gather_objects(value: T) -> list[T]:
    """The ``value`` of every rank, by rank (pickled on the way; for small things such as a host name)."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * env.world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def together(work: Callable[[], T], *, what: str) -> T:
    """Run ``work`` on every rank; when it fails on any, raise on all, so that no rank waits for a dead one.

    A rank that failed raises its own error, the others a ``PeerFailedError`` naming ``what``.
    """
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        failure = error
    everywhere = env.agree(failure is None)
    if failure is not None:
        raise failure
    if not everywhere:
        raise PeerFailedError(f"{what} failed on another rank, which says why")
    return result[0]


def on_main(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and hand its result, or its error, to every rank."""
    answer: tuple[T | None, Exception | None] = (None, None)
    if env.is_main():
        try:
            answer = (work(), None)
        except Exception as error:
            answer = (None, error)
    value, failure = env.broadcast_object(answer)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
