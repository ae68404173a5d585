"""SwiGLU: down(silu(gate x) * (up x))."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Normal, new_parameter
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """The position-wise half of a block; its hidden columns are what tensor parallelism splits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden, std = config.dim, config.mlp_width, config.init_std
        sharded = ParallelKind.SHARDED
        self.gate_weight = new_parameter(hidden, dim, initial=Normal(std), kind=sharded, dim=0)
        self.up_weight = new_parameter(hidden, dim, initial=Normal(std), kind=sharded, dim=0)
        depth_scaled = Normal(std / (2 * config.num_layers) ** 0.5)
        self.down_weight = new_parameter(dim, hidden, initial=depth_scaled, kind=sharded, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        both = F.linear(x, torch.cat([self.gate_weight, self.up_weight]))
        gate, up = both.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_weight)
