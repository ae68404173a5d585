"""Gated DeltaNet and DeltaNet in the block of Trellis (arXiv 2412.06464 and 2406.06484).

    q, k = l2norm(silu(conv(W_q x))), l2norm(silu(conv(W_k x)))         v = silu(conv(W_v x))
    b = sigmoid(w_b x)        log a = -exp(A) softplus(w_a x + d)       DeltaNet: a = 1

A starts as log u, u uniform in [1, 16] as in Mamba2; the original draws from [0, 16], so that one head in 16
begins with a slower decay than any of ours. softplus(d) is log-uniform in [.001, .1], as in the original.
With ``skip_values`` d v, d [H] at 1 at first, is added to what a head reads: Mamba2's skip, not theirs.
The norm per head adds 1e-5 D to the mean square: the original's adds 1e-5, of outputs D^{-1/2} as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.baselines.delta_rule import gated_delta_rule
from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.models.init import Constant, InverseSoftplus, LogUniform
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide
from trellis_dist.models.norm import l2_normalise

__all__ = ["DeltaNetMixer", "GatedDeltaNetMixer"]


class DeltaNetMixer(RecurrentMixer):
    """A head keeps one matrix [D, V] and corrects what it says of a key."""

    kind: ClassVar[LayerKind] = "deltanet"
    skip: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, gated_delta_rule)
        if self.options.skip_values:
            self.add("skip", config.num_heads, initial=Constant(1.0))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys, values and the step."""
        return [*super().list_projections(config), Projection("beta", 1)]

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """K K^T, Q K^T and its product with E, the substitution of D + V columns; Q S, W S, K^T E."""
        width, chunk = config.head_dim, config.baselines.chunk_size
        return 2.0 * (3 * chunk * width + chunk * width + 3 * width**2)

    @classmethod
    def own_norm_eps(cls, config: ModelConfig) -> float:
        """The original's, of outputs that are sqrt(D) times as large."""
        return 1e-5 * config.head_dim

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k of unit norm, v and beta in (0, 1)."""
        q, k = l2_normalise(parts["q"]), l2_normalise(parts["k"])
        return {"q": q, "k": k, "v": parts["v"], "beta": torch.sigmoid(wide(parts["beta"].squeeze(-1)))}

    def beside(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """v, for the skip."""
        return {"v": parts["v"]} if self.options.skip_values else {}

    def finish(self, y: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """y + d v where there is a skip."""
        if not self.options.skip_values:
            return y
        return y + (wide(self.skip)[:, None] * beside["v"]).to(y.dtype)


class GatedDeltaNetMixer(DeltaNetMixer):
    """DeltaNet whose memory decays by a gate per head and token."""

    kind = "gated_deltanet"
    rate: nn.Parameter
    decay_bias: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.add("rate", config.num_heads, initial=LogUniform(1.0, 16.0))
        self.add("decay_bias", config.num_heads, initial=InverseSoftplus(0.001, 0.1))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """DeltaNet's and the decay's."""
        return [*super().list_projections(config), Projection("decay", 1)]

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DeltaNet's and log_decay."""
        step = F.softplus(wide(parts["decay"].squeeze(-1)) + wide(self.decay_bias))
        return {**super().make_tokens(parts), "log_decay": -wide(self.rate).exp() * step}
