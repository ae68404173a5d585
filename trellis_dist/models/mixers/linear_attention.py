"""Linear attention in the block of Trellis (arXiv 2006.16236).

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))

SiLU is the feature map. The original's, elu(x) + 1, is for raw projections: behind a SiLU it is at least .75,
so all keys would point one way, and a head would read little but the mean of its values. The original's
normaliser q^T sum k is left out: the norm over each head that follows divides by more than it (TransNormer,
arXiv 2210.10340), and the sum is a state more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kernels.baselines.linear_attention import decayed_linear_attention
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.mixers.recurrent import RecurrentMixer

__all__ = ["LinearAttentionMixer"]


class LinearAttentionMixer(RecurrentMixer):
    """A head sums key times value over all tokens."""

    kind = "linear_attention"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, decayed_linear_attention)

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """Q K^T and its product with V; Q S and K^T V."""
        width, chunk = config.head_dim, config.baselines.chunk_size
        return 2.0 * (2 * chunk * width + 2 * width**2)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k and v as they are."""
        return dict(parts)
