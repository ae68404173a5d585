"""TTT-linear in the block of Trellis (arXiv 2407.04620): a head is a linear layer that learns while it reads.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
    e = ttt_step / D sigmoid(w_e x + b_e)        s_i = max(1 / (i + 1) + r_i, 0)

The recurrence is kernels.baselines.ttt. A head starts from a learned W ~ N(0, init_std), b = 0; b_e and r at
0, the inner norm at one and zero. As in the original queries and keys have no unit norm, and every slot i
of a mini-batch learns its scale; here each head has its own (there the heads of a layer share them). The
rotary positions inside a mini-batch and the norm across heads of the original's block are left out: all
baselines have one block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.baselines.ttt import ttt_linear
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Constant
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide

__all__ = ["TTTLinearMixer"]


class TTTLinearMixer(RecurrentMixer):
    """A head keeps a linear layer and the sum of the gradients of the mini-batch that it is in."""

    kind = "ttt_linear"
    step_bias: nn.Parameter
    slot_rest: nn.Parameter
    inner_norm_weight: nn.Parameter
    inner_norm_bias: nn.Parameter
    initial_weight: nn.Parameter
    initial_bias: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, ttt_linear)
        heads, width = config.num_heads, config.head_dim
        self.add("step_bias", heads, initial=Constant(0.0))
        self.add("slot_rest", heads, config.baselines.mini_batch, initial=Constant(0.0))
        self.add("inner_norm_weight", heads, width, initial=Constant(1.0))
        self.add("inner_norm_bias", heads, width, initial=Constant(0.0))
        self.add("initial_weight", heads, width, width)
        self.add("initial_bias", heads, width, initial=Constant(0.0))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys, values and the step."""
        return [*super().list_projections(config), Projection("step", 1)]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """[W; b] at the mini-batch's start and the sum of its gradients, [D + 1, V] each."""
        return ((config.head_dim + 1, config.head_dim),) * 2

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """Q K^T and its product with G; K W, K^T G and Q W."""
        width, batch = config.head_dim, config.baselines.mini_batch
        return 2.0 * (batch * (width + 1) + batch * width + 3 * (width + 1) * width)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k, v and the step."""
        gate = torch.sigmoid(wide(parts["step"].squeeze(-1)) + wide(self.step_bias))
        step = self.options.ttt_step / self.config.head_dim * gate
        return {"q": parts["q"], "k": parts["k"], "v": parts["v"], "step": step}

    def head_weights(self) -> dict[str, Tensor]:
        """The inner norm's, and the scale of each slot."""
        rest = wide(self.slot_rest)
        mean = 1 / torch.arange(1, rest.shape[1] + 1, dtype=rest.dtype, device=rest.device)
        return {
            "norm_weight": wide(self.inner_norm_weight),
            "norm_bias": wide(self.inner_norm_bias),
            "slot_scale": (mean + rest).clamp_min(0),
        }

    def first_memory(self, documents: int) -> tuple[Tensor, ...]:
        """The learned layer, and no gradients."""
        layer = torch.cat([wide(self.initial_weight), wide(self.initial_bias).unsqueeze(1)], dim=1)
        shape = (documents, *layer.shape)
        return layer.expand(shape), torch.zeros_like(layer).expand(shape)
