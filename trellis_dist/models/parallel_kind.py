"""How a parameter behaves when heads, MLP columns or vocabulary are split over tensor-parallel ranks.

A parameter that declares nothing would have its gradient counted wrongly without any error, so
``undeclared`` lists such parameters and the parallel room refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

__all__ = ["ParallelKind", "Shard", "declare", "keep_shard", "kind_of", "shard_dim", "shard_of", "undeclared"]


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


@dataclass(frozen=True)
class Shard:
    """Where a parameter's local tensor lies in the whole one.

    Attributes:
        shape: of the whole tensor.
        offset: coordinates of the local tensor's first element.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]


def shard_of(parameter: Tensor) -> Shard:
    """The place of ``parameter`` in its whole tensor; the whole itself unless ``keep_shard`` cut it."""
    shape = tuple(parameter.shape)
    return getattr(parameter, "shard", None) or Shard(shape, (0,) * len(shape))


def keep_shard(parameter: nn.Parameter, *, index: int, count: int) -> None:
    """Keep only slice ``index`` of ``count`` equal ones along the declared dimension, in place.

    Marks the parameter with ``tensor_model_parallel``, the name under which Megatron and DeepSpeed look for
    parameters that count once per tensor-parallel rank in a gradient norm.

    Raises:
        ValueError: the dimension does not divide into ``count`` slices.
    """
    dim = shard_dim(parameter)
    assert dim is not None, "only a sharded parameter names the dimension it is cut along"
    shape = tuple(parameter.shape)
    if shape[dim] % count:
        raise ValueError(f"dimension {dim} of {list(shape)} does not divide into {count} equal slices")
    size = shape[dim] // count
    parameter.data = parameter.data.narrow(dim, index * size, size).clone()
    offset = tuple(index * size if axis == dim else 0 for axis in range(len(shape)))
    parameter.shard = Shard(shape, offset)  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def undeclared(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that declare no kind."""
    return [name for name, parameter in model.named_parameters() if kind_of(parameter) is None]
