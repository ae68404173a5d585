"""Causal softmax attention with rotary positions: what Trellis is measured against, and half of a hybrid.

Shapes: B rows, T tokens, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.init import Normal, new_parameter
from trellis_dist.models.kv_cache import KVCache
from trellis_dist.models.linear import linear, linear_joined
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["AttentionMixer", "rotate"]


class AttentionMixer(nn.Module):
    """Multi-head attention over the document's earlier tokens, or over the last ``window`` of them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.window = config, config.attention.window
        width, weight = config.dim, Normal(config.init_std)
        sharded: dict[str, Any] = {"kind": ParallelKind.SHARDED, "dim": 0}
        self.q_weight = new_parameter(width, width, initial=weight, **sharded)
        self.k_weight = new_parameter(width, width, initial=weight, **sharded)
        self.v_weight = new_parameter(width, width, initial=weight, **sharded)
        depth_scaled = Normal(config.init_std / (2 * config.num_layers) ** 0.5)
        self.out_weight = new_parameter(width, width, initial=depth_scaled, kind=ParallelKind.SHARDED, dim=1)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; attends inside each document of ``context``."""
        positions = context.positions
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = self._project(x, positions)
        if context.lengths is None:
            return self._output(self._attend(q, k, v))
        # One call per document: exact, and no T x T mask however long the row is.
        documents = zip(*(part.split(context.lengths, dim=2) for part in (q, k, v)), strict=True)
        return self._output(torch.cat([self._attend(*document) for document in documents], dim=2))

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for ``batch`` rows."""
        empty = self.q_weight.new_empty(
            batch, len(self.q_weight) // self.config.head_dim, 0, self.config.head_dim
        )
        return KVCache.empty(empty, window=self.window)

    def prefill(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Continue ``state`` over x [B, T, dim]; returns ([B, T, dim], the state after it)."""
        positions = torch.arange(state.position, state.position + x.shape[1], device=x.device)
        q, k, v = self._project(x, positions)
        past_k, past_v = state.keys_values()
        y = self._attend(q, torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2))
        return self._output(y), state.append(k, v)

    def decode_step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """One token: x [B, dim] -> ([B, dim], the state after it)."""
        position = torch.full((1,), state.position, device=x.device)
        q, k, v = self._project(x.unsqueeze(1), position)
        state = state.append(k, v)
        y = F.scaled_dot_product_attention(q, *state.keys_values())
        return self._output(y).squeeze(1), state

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and plain v, each [B, H, T, D]."""
        fused = linear_joined(x, [self.q_weight, self.k_weight, self.v_weight])
        heads = fused.unflatten(-1, (3, -1, self.config.head_dim))  # [B, T, 3, H, D]
        q_k = rotate(heads[:, :, :2], positions, theta=self.config.attention.rope_theta)
        q, k = (part.transpose(1, 2) for part in q_k.unbind(2))
        return q, k, heads[:, :, 2].transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the last q.shape[2] positions of k: [B, H, Tq, D] x [B, H, Tk, D] twice."""
        queries, keys = q.shape[2], k.shape[2]
        if queries == keys and (self.window is None or self.window >= keys):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        distance = torch.arange(keys - queries, keys, device=q.device)[:, None]
        distance = distance - torch.arange(keys, device=q.device)
        mask = distance >= 0
        if self.window is not None:
            mask &= distance < self.window
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _output(self, y: Tensor) -> Tensor:
        return linear(y.transpose(1, 2).flatten(-2), self.out_weight)


def rotate(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """Rotary embedding: the pair (x_i, x_{i + D/2}) turns by position * theta^(-2i/D).

    Args:
        x: [B, T, ..., D], D even.
        positions: int64 [T].
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[:, None] * frequency).view(-1, *[1] * (x.dim() - 3), half)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    first, second = x[..., :half].to(wide), x[..., half:].to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
