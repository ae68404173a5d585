"""RWKV-7 in the block of Trellis (arXiv 2503.14456): its generalised delta rule between our projections.

    r, k, v = silu(conv(W_r x)), silu(conv(W_k x)), silu(conv(W_v x))
    a = sigmoid(a_0 + U_a W_a x)              log w = -e^{-1/2} sigmoid(w_0 + U_w tanh(W_w x))
    h = l2norm(k o xi)                        k~ = k o (1 + (a - 1) o kappa)
    S_t = (diag(w_t) - (a_t o h_t) h_t^T) S_{t-1} + k~_t v_t^T
    y_t = S_t^T r_t + (r_t . (rho o k~_t)) v_t

As in the original: the bounds of w, the bonus y has of its own token, the norm's epsilon (1e-5 D), and the
initial w_0, a_0, xi, kappa and rho, the first of which spread the decays from one per two tokens to one per
thousands.

Ours, because one block stands around all recurrent layers: the short convolution with its SiLU instead of
token shift, the GELU gate, and an RMS norm per head behind the bonus where the original has a group norm with
bias before it. Matrices start as all of ours do, where the original's are orthogonal. Ours, so that a layer
splits over tensor-parallel ranks by heads: W_w, U_w and W_a, U_a are low-rank per head, of rank D / 4 (the
original's are shared by all heads, of rank 64 to 128), so w and a cost what they do there, or a little more.
Left out: the values that later layers mix with those of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.baselines.rwkv7 import generalised_delta_rule
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.init import Constant, Ramp
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide
from trellis_dist.models.norm import l2_normalise

__all__ = ["RWKV7Mixer"]


class RWKV7Mixer(RecurrentMixer):
    """A head takes out what it says of one key and puts in a value at another, channel by channel.

    Attributes:
        decay_bias, rate_bias, removal: w_0, a_0, xi [H D], vectors, which no optimiser decays.
        replacement, bonus: kappa, rho [H, D].
        decay_up, rate_up: U_w, U_a [H, D, rank].
    """

    kind = "rwkv7"
    decay_bias: nn.Parameter
    rate_bias: nn.Parameter
    removal: nn.Parameter
    replacement: nn.Parameter
    bonus: nn.Parameter
    decay_up: nn.Parameter
    rate_up: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, generalised_delta_rule)
        heads, width = config.num_heads, config.head_dim
        depth = layer / max(1, config.num_layers - 1)
        steep = Ramp(-5.5, 0.5, width, power=1 + depth**0.3, zigzag=2.5)
        self.add("decay_bias", heads * width, initial=steep)
        self.add("rate_bias", heads * width, initial=Ramp(-0.39, 0.01, width, zigzag=0.3))
        self.add("removal", heads * width, initial=Ramp(0.76, 0.66, width))
        self.add("replacement", heads, width, initial=Constant(1.02))
        self.add("bonus", heads, width, initial=Constant(-0.04))
        for name in ("decay_up", "rate_up"):
            self.add(name, heads, width, _rank(config))

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """r (as q), k, v, and what w and a are made of."""
        return [
            *super().list_projections(config),
            Projection("decay", _rank(config)),
            Projection("rate", _rank(config)),
        ]

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """U_w and U_a; half of four score matrices, their three products with V and U, the substitution of
        D + V columns; Q S, W S, K^T V and B^T U."""
        width, chunk = config.head_dim, config.baselines.chunk_size
        return 2.0 * (
            2 * width * _rank(config) + 2 * chunk * width + 3 * chunk * width + chunk * width + 4 * width**2
        )

    @classmethod
    def own_norm_eps(cls, config: ModelConfig) -> float:
        """The original's."""
        return 1e-5 * config.head_dim

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q = r, k = k~, v, key = h, rate = a and log_decay."""
        k, rate = parts["k"], self._rate(parts)
        logit = self._up(torch.tanh(wide(parts["decay"])), self.decay_up) + self._of_heads(self.decay_bias)
        return {
            "q": parts["q"],
            "k": self._replaced(k, rate),
            "v": parts["v"],
            "key": l2_normalise((wide(k) * self._of_heads(self.removal)).to(k.dtype)),
            "rate": rate,
            "log_decay": -math.exp(-0.5) * torch.sigmoid(logit),
        }

    def beside(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(r . (rho o k~)) v."""
        k = self._replaced(parts["k"], self._rate(parts))
        strength = (wide(parts["q"]) * wide(k) * wide(self.bonus)).sum(-1, keepdim=True)
        return {"own": (strength * parts["v"]).to(parts["v"].dtype)}

    def finish(self, y: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """y and the bonus of its own token."""
        return y + beside["own"]

    def _rate(self, parts: Mapping[str, Tensor]) -> Tensor:
        """a [B, T, H, D]."""
        return torch.sigmoid(self._up(wide(parts["rate"]), self.rate_up) + self._of_heads(self.rate_bias))

    def _replaced(self, k: Tensor, rate: Tensor) -> Tensor:
        """k~ [B, T, H, D]."""
        return (wide(k) * (1 + (rate - 1) * wide(self.replacement))).to(k.dtype)

    def _of_heads(self, vector: Tensor) -> Tensor:
        """[H D] -> [H, D]."""
        return wide(vector).view(-1, self.config.head_dim)

    @staticmethod
    def _up(x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, H, rank], weight [H, D, rank] -> [B, T, H, D]."""
        return torch.einsum("bthr,hdr->bthd", x, wide(weight))


def _rank(config: ModelConfig) -> int:
    """Of W_w and W_a, per head."""
    return max(1, config.head_dim // 4)
