"""SwiGLU: down(silu(gate x) * (up x))."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Normal, new_parameter
from trellis_dist.models.linear import ColumnFunction, RowFunction, linear, linear_joined
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """The position-wise half of a block; its hidden columns are what tensor parallelism splits.

    Attributes:
        column, row: like ``linear.linear_joined`` and ``linear.linear``; parallel/ replaces them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.column: ColumnFunction = linear_joined
        self.row: RowFunction = linear
        dim, hidden, std = config.dim, config.mlp_width, config.init_std
        sharded = ParallelKind.SHARDED
        self.gate_weight = new_parameter(hidden, dim, initial=Normal(std), kind=sharded, dim=0)
        self.up_weight = new_parameter(hidden, dim, initial=Normal(std), kind=sharded, dim=0)
        self.down_weight = new_parameter(
            dim, hidden, initial=Normal(config.residual_std), kind=sharded, dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        both = self.column(x, [self.gate_weight, self.up_weight])
        return self.row(_GatedSiLU.apply(both), self.down_weight)  # type: ignore[no-untyped-call]


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate | up]; one buffer holds both gradients, so none is copied together."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        gradient = torch.empty_like(both)
        dgate, dup = gradient.chunk(2, dim=-1)
        dup.copy_(F.silu(gate)).mul_(dy)  # not mul(out=dup): torch.compile refuses strided outputs
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return gradient
