"""How a parameter behaves when heads, MLP columns or vocabulary are split over tensor-parallel ranks.

A parameter that declares nothing would have its gradient counted wrongly without any error, so
``undeclared`` lists such parameters and the parallel room refuses them.
"""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor, nn

__all__ = ["ParallelKind", "declare", "kind_of", "shard_dim", "undeclared"]


class ParallelKind(StrEnum):
    """What a tensor-parallel rank holds of a parameter, and what its local gradient is.

    SHARDED: a slice along one dimension; the local gradient is complete.
    REPLICATED: the whole tensor, applied to whole activations; the local gradient is complete.
    REPLICATED_PARTIAL: the whole tensor, applied to sharded activations; gradients are summed over ``tp``.
    """

    SHARDED = "sharded"
    REPLICATED = "replicated"
    REPLICATED_PARTIAL = "replicated_partial"


def declare(parameter: nn.Parameter, kind: ParallelKind, *, dim: int | None = None) -> nn.Parameter:
    """Attach ``kind`` (and the split dimension ``dim`` of a sharded tensor) to ``parameter``; returns it."""
    assert (dim is not None) == (kind is ParallelKind.SHARDED), (
        "exactly the sharded parameters name a dimension"
    )
    parameter.tensor_parallel = kind  # type: ignore[attr-defined]
    parameter.tensor_parallel_dim = dim  # type: ignore[attr-defined]
    return parameter


def kind_of(parameter: Tensor) -> ParallelKind | None:
    """The declared kind, or None."""
    return getattr(parameter, "tensor_parallel", None)


def shard_dim(parameter: Tensor) -> int | None:
    """The dimension along which a sharded parameter is split; None for the other kinds."""
    return getattr(parameter, "tensor_parallel_dim", None)


def undeclared(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that declare no kind."""
    return [name for name, parameter in model.named_parameters() if kind_of(parameter) is None]
