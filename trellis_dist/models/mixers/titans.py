"""Titans' neural memory in the block of Trellis (arXiv 2501.00663, section 3; there "LMM").

    q, k = l2norm(silu(conv(W_q x))), l2norm(silu(conv(W_k x)))         v = silu(conv(W_v x))
    theta = titans_step / C sigmoid(w_e x + b_e)
    1 - alpha = sigmoid(w_a x + b_a)        eta = sigmoid(w_h x + b_h)

The recurrence is kernels.baselines.titans, C the mini-batch. A head starts from a learned MLP of square
layers W ~ N(0, 1 / D), which shrink little what goes through: the slope of a layer norm is one over the size
of what it normalises. The momentum starts at 0, as b_e does; the other biases are options.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.baselines.titans import titans
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Constant, Normal
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide
from trellis_dist.models.norm import l2_normalise

__all__ = ["TitansMixer"]


class TitansMixer(RecurrentMixer):
    """A head keeps an MLP, its momentum, and the MLP at the start of the mini-batch."""

    kind = "titans"
    step_bias: nn.Parameter
    keep_bias: nn.Parameter
    momentum_bias: nn.Parameter
    inner_norm_weight: nn.Parameter
    inner_norm_bias: nn.Parameter
    initial_layers: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, titans)
        heads, width, options = config.num_heads, config.head_dim, config.baselines
        self.add("step_bias", heads, initial=Constant(0.0))
        self.add("keep_bias", heads, initial=Constant(options.titans_keep_bias))
        self.add("momentum_bias", heads, initial=Constant(options.titans_momentum_bias))
        self.add("inner_norm_weight", heads, width, initial=Constant(1.0))
        self.add("inner_norm_bias", heads, width, initial=Constant(0.0))
        self.add("initial_layers", heads, options.titans_depth, width, width, initial=Normal(width**-0.5))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys, values, and the logits of step, forget gate and momentum."""
        return [
            *super().list_projections(config),
            Projection("step", 1),
            Projection("keep", 1),
            Projection("momentum", 1),
        ]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Layers and their momenta [L, 2, D, D], and the layers at the mini-batch's start [L, D, D]."""
        depth, width = config.baselines.titans_depth, config.head_dim
        return (depth, 2, width, width), (depth, width, width)

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """Of a layer: Q X^T and its product with G; X W, X^T G twice, Q W, Q S; G W^T but for the first."""
        width, batch, depth = config.head_dim, config.baselines.mini_batch, config.baselines.titans_depth
        return 2.0 * (depth * (2 * batch * width + 5 * width**2) + (depth - 1) * width**2)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k of unit norm, v, the step, and the logarithms of the other gates."""
        step, keep, momentum = (
            wide(parts[name].squeeze(-1)) + wide(bias)
            for name, bias in (
                ("step", self.step_bias),
                ("keep", self.keep_bias),
                ("momentum", self.momentum_bias),
            )
        )
        return {
            "q": l2_normalise(parts["q"]),
            "k": l2_normalise(parts["k"]),
            "v": parts["v"],
            "step": self.options.titans_step / self.options.mini_batch * torch.sigmoid(step),
            "log_keep": F.logsigmoid(keep),
            "log_momentum": F.logsigmoid(momentum),
        }

    def head_weights(self) -> dict[str, Tensor]:
        """The inner norm's."""
        return {"norm_weight": wide(self.inner_norm_weight), "norm_bias": wide(self.inner_norm_bias)}

    def first_memory(self, documents: int) -> tuple[Tensor, ...]:
        """The learned layers without momentum, and the learned layers."""
        layers = wide(self.initial_layers)
        state = torch.stack([layers, torch.zeros_like(layers)], dim=2)
        return state.expand(documents, *state.shape), layers.expand(documents, *layers.shape)
