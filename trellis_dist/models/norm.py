"""Root-mean-square normalisation with and without weight; statistics in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trellis_dist.models.init import Constant, new_parameter
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["RMSNorm", "l2_normalise", "rms_normalise"]


def rms_normalise(x: Tensor, *, eps: float, weight: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale * weight * x / sqrt(mean(x^2) + eps) over the last dimension.

    Args:
        x: [..., n].
        weight: broadcastable to x's last dimensions, or None.
    """
    if x.is_cuda:
        y = F.rms_norm(x, (x.shape[-1],), None, eps)
        y = y if weight is None else y * weight
        return y if scale == 1.0 else scale * y
    # F.rms_norm is a chain of six operations on a CPU; one Function with a short backward takes a third.
    return _RMSNormalise.apply(x, weight, eps, scale)  # type: ignore[no-any-return, no-untyped-call]


def l2_normalise(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension."""
    size = x.shape[-1]
    return rms_normalise(x, eps=eps / size, scale=size**-0.5)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of size ``dim``; weight starts at one."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(dim, initial=Constant(1.0), kind=ParallelKind.REPLICATED)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_normalise(x, eps=self.eps, weight=self.weight)


class _RMSNormalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, scale: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        size = x.shape[-1]
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(size).add_(eps).rsqrt_()
        if scale != 1.0:
            inverse.mul_(scale)
        unit = wide * inverse
        ctx.save_for_backward(unit, inverse, weight)
        ctx.dtype, ctx.mean_factor = x.dtype, 1.0 / (size * scale * scale)
        y = unit if weight is None else unit * weight
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        unit, inverse, weight = ctx.saved_tensors
        dy = dy.to(unit.dtype)
        dweight = None
        if weight is not None:
            dweight = (dy * unit).sum_to_size(weight.shape).to(weight.dtype)
            dy = dy * weight
        # dx = inverse (dy - unit <dy, unit> / (n scale^2)), since |unit|^2 = n scale^2 up to eps
        with torch.autocast(dy.device.type, enabled=False):  # torch.compile runs backward under forward's
            coefficient = torch.linalg.vecdot(dy, unit).unsqueeze(-1).mul_(-ctx.mean_factor)
        dx = torch.addcmul(dy, unit, coefficient).mul_(inverse)
        return dx.to(ctx.dtype), dweight, None, None
