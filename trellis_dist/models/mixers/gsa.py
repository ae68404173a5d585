"""Gated slot attention in the block of Trellis (arXiv 2409.07146).

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
    log a = logsigmoid(W_a x) / 8        w = 1 - a        one decay per slot

As in the original: SiLU is the feature map of queries and keys, q is not scaled, the 8 starts the decays at
2^{-1/8} = 0.92. Ours are the short convolution (the original's is off by default), and what the block does
after the recurrence: a norm per head and a gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.slots import gated_slot_attention
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.mixers.recurrent import Projection, RecurrentMixer, wide

__all__ = ["GSAMixer", "slot_flops"]

GATE_NORMALISER = 8  # gate_logit_normalizer of the original


def slot_flops(config: ModelConfig) -> float:
    """Forward FLOPs per token and head of attention over slots: GSA's, ABC's.

    Of chunks: Q K^T, the product with V, and half of those with the slots (the pairs i > j are all that is
    computed). Of the memories: two reads and two writes.
    """
    width, slots, chunk = config.head_dim, config.baselines.slots, config.baselines.chunk_size
    return 2.0 * (2 * chunk * width + chunk * slots + 4 * width * slots)


class GSAMixer(RecurrentMixer):
    """A head keeps a key and a value per slot, and forgets each at its own rate."""

    kind = "gsa"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, gated_slot_attention)

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """Queries, keys, values and a decay per slot."""
        return [*super().list_projections(config), Projection("decay", config.baselines.slots)]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """S [D, M] and R [M, V]."""
        width, slots = config.head_dim, config.baselines.slots
        return ((width, slots), (slots, width))

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """`slot_flops`."""
        return slot_flops(config)

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """q, k, v, log_decay and write = 1 - e^log_decay."""
        log_decay = F.logsigmoid(wide(parts["decay"])) / GATE_NORMALISER
        named = {name: parts[name] for name in ("q", "k", "v")}
        return {**named, "log_decay": log_decay, "write": -torch.expm1(log_decay)}
