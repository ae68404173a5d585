"""Gradients over the mesh, once per optimizer step: what is summed over which ranks, and the norm of it all.

Every rank passes the same parameters in the same order; one that has no gradient here is passed as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trellis_dist.models.parallel_kind import ParallelKind, kind_of
from trellis_dist.parallel.mesh import Mesh

__all__ = [
    "gradient_norm",
    "partial_over_tensor",
    "sum_replica_gradients",
    "sum_sequence_gradients",
    "sum_tensor_gradients",
]

# One all-reduce moves about this many elements, enough to reach bandwidth without a second copy of the model.
_BUCKET_ELEMENTS = 16 * 1024 * 1024


def sum_sequence_gradients(gradients: Iterable[Tensor], mesh: Mesh) -> None:
    """Sum ``gradients`` in place over the sp group: each segment contributes its tokens.

    Call it once per optimizer step, after the last backward and before the norm: all sp ranks then hold the
    same bits, so each computes the same norm without another exchange.
    """
    _sum_over(mesh.sp_group, gradients)


def sum_replica_gradients(gradients: Iterable[Tensor], mesh: Mesh) -> None:
    """The same over dp x sp: each replica contributes its rows, each segment its tokens of them."""
    _sum_over(mesh.replica_group, gradients)


def partial_over_tensor(parameter: Tensor, mesh: Mesh) -> bool:
    """Whether a tp rank's gradient of ``parameter`` is one of tp summands.

    Always for what every rank holds whole and applies to its own heads; in Megatron's sequence parallelism
    also for norm weights and the like, which see 1/tp of the tokens on each rank.
    """
    if mesh.tp == 1:
        return False
    kind = kind_of(parameter)
    if kind is ParallelKind.REPLICATED_PARTIAL:
        return True
    return kind is ParallelKind.REPLICATED and mesh.sequence_parallel


def sum_tensor_gradients(gradients: Iterable[tuple[Tensor, Tensor]], mesh: Mesh) -> None:
    """Of (parameter, gradient) pairs, sum in place over tp the gradients that are ``partial_over_tensor``."""
    _sum_over(mesh.tp_group, (grad for parameter, grad in gradients if partial_over_tensor(parameter, mesh)))


def gradient_norm(
    gradients: Sequence[tuple[Tensor, Tensor]], mesh: Mesh, *, shards: dist.ProcessGroup | None = None
) -> float:
    """L2 norm of the whole gradient from (parameter, gradient) pairs, the same on every rank.

    Each parameter counts once: a tp shard as it is, a whole gradient 1/tp on each tp rank, so that a
    non-finite element on any of them is seen by all.

    Args:
        shards: the ranks among which every gradient is cut further (FSDP); None: it is not.
    """
    if not gradients:
        return 0.0
    norms = torch._foreach_norm([gradient.detach() for _, gradient in gradients])
    squares = torch.stack([norm.double() for norm in norms]).square()
    if mesh.tp > 1:
        split = [getattr(parameter, "tensor_model_parallel", False) for parameter, _ in gradients]
        squares = squares * torch.tensor([1.0 if here else 1.0 / mesh.tp for here in split]).to(squares)
    total = squares.sum()
    for group in (shards, mesh.tp_group):
        if group is not None:
            dist.all_reduce(total, group=group)
    return float(total.sqrt())


def _sum_over(group: dist.ProcessGroup | None, gradients: Iterable[Tensor]) -> None:
    if group is None:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            _size(bucket) + gradient.numel() > _BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype
        ):
            _sum_bucket(bucket, group)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum_bucket(bucket, group)


def _size(bucket: list[Tensor]) -> int:
    return sum(gradient.numel() for gradient in bucket)


def _sum_bucket(bucket: list[Tensor], group: dist.ProcessGroup) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in bucket])
    for gradient, part in zip(bucket, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
