"""Gradients of parameters that every sp rank holds whole: summed over the segments once per step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from trellis_dist.parallel.mesh import Mesh

__all__ = ["sum_sequence_gradients"]

# One all-reduce moves about this many elements, enough to reach bandwidth without a second copy of the model.
_BUCKET_ELEMENTS = 16 * 1024 * 1024


def sum_sequence_gradients(gradients: Iterable[Tensor], mesh: Mesh) -> None:
    """Sum ``gradients`` in place over the sp group: each segment contributes its tokens.

    Call it once per optimizer step, after the last backward and before the norm: all sp ranks then hold the
    same bits, so each computes the same norm without another exchange. Every rank passes the same list in the
    same order; a parameter without a gradient here must be passed as zeros.
    """
    if mesh.sp == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            _size(bucket) + gradient.numel() > _BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype
        ):
            _sum_bucket(bucket, mesh.sp_group)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum_bucket(bucket, mesh.sp_group)


def _size(bucket: list[Tensor]) -> int:
    return sum(gradient.numel() for gradient in bucket)


def _sum_bucket(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in bucket])
    for gradient, part in zip(bucket, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
