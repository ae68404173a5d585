"""Attention with bounded-memory control in the block of Trellis (arXiv 2110.02488).

    q, k, v = silu(conv(W_q x)) / sqrt(D), silu(conv(W_k x)), silu(conv(W_v x))        s = W_s x, one per slot

Each slot holds the mean of all keys and values weighted with e^s (kernels.baselines.slots), in the form
of flash-linear-attention. That clamps s to [-32, 32] and rotates q and k by position; here the scores are
carried as logs and need no bounds, and the short convolution stands in for positions, as in all recurrent
layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.baselines.slots import bounded_memory_attention
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.mixers.gsa import slot_flops
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide

__all__ = ["ABCMixer"]


class ABCMixer(RecurrentMixer):
    """A head keeps a weighted mean of all keys and one of all values per slot."""

    kind = "abc"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, bounded_memory_attention)

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys, values and a score per slot."""
        return [*super().list_projections(config), Projection("scores", config.baselines.slots)]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """S [D, M], R [M, V] and z [M], the log of what the scores summed to."""
        width, slots = config.head_dim, config.baselines.slots
        return ((width, slots), (slots, width), (slots,))

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """`slot_flops`."""
        return slot_flops(config)

    def first_memory(self, documents: int) -> tuple[Tensor, ...]:
        """Zeros, and z = log 0."""
        keys, values, z = super().first_memory(documents)
        return keys, values, z[:1].fill_(-torch.inf).expand_as(z)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q / sqrt(D), k, v and scores."""
        q = parts["q"] * self.config.head_dim**-0.5
        return {"q": q, "k": parts["k"], "v": parts["v"], "scores": wide(parts["scores"])}
