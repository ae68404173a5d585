"""Mamba2 in the block of Trellis (arXiv 2405.21060): its state-space duality between our projections.

    C, B, u = silu(conv(W_c x)), silu(conv(W_b x)), silu(conv(W_u x))        dt = softplus(w_d x + d)
    S_t = e^{-e^A dt_t} S_{t-1} + B_t (dt_t u_t)^T        y_t = S_t^T C_t + D u_t

Queries are C, keys B, values dt u. Every head has a B and a C of its own (the original shares them among the
heads of a group), of the head's width: so its state has the size of the other baselines' and it splits over
tensor-parallel ranks as they do. A starts as log v, v uniform in [1, 16], softplus(d) log-uniform in
[.001, .1], D at 1, as in the original.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.baselines.linear_attention import decayed_linear_attention
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Constant, InverseSoftplus, LogUniform
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide

__all__ = ["Mamba2Mixer"]


class Mamba2Mixer(RecurrentMixer):
    """A head's state decays by a gate of its input, which also scales what is written."""

    kind = "mamba2"
    rate: nn.Parameter
    step_bias: nn.Parameter
    skip: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, decayed_linear_attention)
        self.add("rate", config.num_heads, initial=LogUniform(1.0, 16.0))
        self.add("step_bias", config.num_heads, initial=InverseSoftplus(0.001, 0.1))
        self.add("skip", config.num_heads, initial=Constant(1.0))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """C, B, u and the step dt."""
        return [*super().list_projections(config), Projection("step", 1)]

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """C B^T and its product with the values; C S and B^T (dt u)."""
        width, chunk = config.head_dim, config.baselines.chunk_size
        return 2.0 * (2 * chunk * width + 2 * width**2)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q = C, k = B, v = dt u and log_decay."""
        step = F.softplus(wide(parts["step"].squeeze(-1)) + wide(self.step_bias))
        v = (parts["v"] * step[..., None]).to(parts["v"].dtype)
        return {"q": parts["q"], "k": parts["k"], "v": v, "log_decay": -wide(self.rate).exp() * step}

    def beside(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """u, for the skip."""
        return {"u": parts["v"]}

    def finish(self, y: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """y + D u."""
        return y + (wide(self.skip)[:, None] * beside["u"]).to(y.dtype)
