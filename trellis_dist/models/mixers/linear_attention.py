"""Linear attention in the block of Trellis (arXiv 2006.16236).

    q, k = p(silu(conv(W_q x))), p(silu(conv(W_k x)))         v = silu(conv(W_v x))        p(x) = elu(x) + 1

The feature map is the original's. Its normaliser q^T sum k is left out: the norm over each head that follows
divides by more than it (TransNormer, arXiv 2210.10340), and the sum is a state more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.linear_attention import decayed_linear_attention
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer

__all__ = ["LinearAttentionMixer"]


class LinearAttentionMixer(RecurrentMixer):
    """A head sums key times value over all tokens."""

    kind = "linear_attention"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, decayed_linear_attention)

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys and values."""
        width, values = config.head_dim, config.baselines.conv_values
        return [
            Projection("q", width, convolved=True),
            Projection("k", width, convolved=True),
            Projection("v", width, convolved=values),
        ]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """S [D, V]."""
        return ((config.head_dim, config.head_dim),)

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """Q K^T and its product with V; Q S and K^T V."""
        width, chunk = config.head_dim, config.baselines.chunk_size
        return 2.0 * (2 * chunk * width + 2 * width**2)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of q and k, and v."""
        return {"q": F.elu(parts["q"]) + 1, "k": F.elu(parts["k"]) + 1, "v": parts["v"]}
