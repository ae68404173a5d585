"""Causal softmax attention with rotary positions: what Trellis is measured against, and half of a hybrid.

Shapes: B rows, T tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.init import Normal, new_parameter
from trellis_dist.models.kv_cache import KVCache
from trellis_dist.models.linear import ColumnFunction, RowFunction, linear, linear_joined
from trellis_dist.models.parallel_kind import ParallelKind
from trellis_dist.models.region import Region, call

__all__ = ["AttentionMixer", "causal_attention", "rotate"]


class AttentionMixer(nn.Module):
    """Multi-head attention over the document's earlier tokens, or over the last ``window`` of them.

    Attributes:
        operation: called like ``causal_attention``; parallel/ replaces it to see the whole sequence.
        column, row: like ``linear.linear_joined`` and ``linear.linear``; parallel/ replaces them to split
            the heads. ``column`` may return more tokens than it was given.
        region: calls what comes before and after the operation; parallel/ replaces it to recompute that
            in the backward pass.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        sliding = config.layer_kind(layer) == "sliding_window"
        self.config = config
        self.window = config.attention.sliding_window if sliding else config.attention.window
        self.operation: Callable[..., Tensor] = causal_attention
        self.column: ColumnFunction = linear_joined
        self.row: RowFunction = linear
        self.region: Region = call
        width, weight = config.dim, Normal(config.init_std)
        sharded: dict[str, Any] = {"kind": ParallelKind.SHARDED, "dim": 0}
        self.q_weight = new_parameter(width, width, initial=weight, **sharded)
        self.k_weight = new_parameter(width, width, initial=weight, **sharded)
        self.v_weight = new_parameter(width, width, initial=weight, **sharded)
        self.out_weight = new_parameter(
            width, width, initial=Normal(config.mixer_out_std), kind=ParallelKind.SHARDED, dim=1
        )

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; attends inside each document of ``context``."""
        q, k, v = self.region(self._project, x)
        y = self.operation(
            q,
            k,
            v,
            theta=self.config.attention.rope_theta,
            window=self.window,
            positions=context.positions,
            lengths=context.lengths,
        )
        return self.region(self._output, y)  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> KVCache:
        """An empty cache for ``batch`` rows."""
        empty = self.q_weight.new_empty(
            batch, len(self.q_weight) // self.config.head_dim, 0, self.config.head_dim
        )
        return KVCache.empty(empty, window=self.window)

    def prefill(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Continue ``state`` over x [B, T, dim]; returns ([B, T, dim], the state after it)."""
        positions = torch.arange(state.position, state.position + x.shape[1], device=x.device)
        q, k, v = self._rotated(x, positions)
        past_k, past_v = state.keys_values()
        y = _attend(q, torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2), window=self.window)
        return self._output(y.transpose(1, 2)), state.append(k, v)

    def decode_step(self, x: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """One token: x [B, dim] -> ([B, dim], the state after it)."""
        position = torch.full((1,), state.position, device=x.device)
        q, k, v = self._rotated(x.unsqueeze(1), position)
        state = state.append(k, v)
        y = F.scaled_dot_product_attention(q, *state.keys_values())
        return self._output(y.transpose(1, 2)).squeeze(1), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [B, T, H, D], not rotated yet."""
        fused = self.column(x, [self.q_weight, self.k_weight, self.v_weight])
        q, k, v = fused.unflatten(-1, (3, -1, self.config.head_dim)).unbind(2)
        return q, k, v

    def _rotated(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and plain v, each [B, H, T, D]."""
        return _rotate_heads(*self._project(x), positions, theta=self.config.attention.rope_theta)

    def _output(self, y: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, T, dim]."""
        return self.row(y.flatten(-2), self.out_weight)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float,
    window: int | None = None,
    positions: Tensor | None = None,
    lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Softmax attention inside each document, q and k rotated first: [B, T, H, D] three times -> the same.

    Args:
        theta: base of the rotary frequencies.
        window: attend to the last ``window`` tokens only.
        positions: int64 [T], position of each token inside its document; None counts from 0.
        lengths: tokens of each document of a packed row (B = 1); None: every row is one document.
    """
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device)
    q, k, v = _rotate_heads(q, k, v, positions, theta=theta)
    if lengths is None:
        return _attend(q, k, v, window=window).transpose(1, 2)
    # One call per document: exact, and no T x T mask however long the row is.
    documents = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), strict=True)
    y = torch.cat([_attend(*document, window=window) for document in documents], dim=2)
    return y.transpose(1, 2)


def _rotate_heads(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, H, D] three times -> rotated q, k and plain v, each [B, H, T, D]."""
    q, k = (rotate(x, positions, theta=theta) for x in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Causal attention of the last q.shape[2] positions of k: [B, H, Tq, D] x [B, H, Tk, D] twice."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys and (window is None or window >= keys):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if queries == keys and window is not None and keys > 2 * window:
        return _attend_in_blocks(q, k, v, window=window)
    mask = _near(queries, keys, window=window, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _near(queries: int, keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """Which of ``keys`` positions each of the last ``queries`` sees: bool [queries, keys]."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """The same over a window of W < T, in O(T W): [B, H, T, D] three times -> the same.

    A block of W queries sees its own W keys and the W before; all but the first share one mask [W, 2 W].
    """
    tokens = q.shape[2]
    begun = slice(0, window)
    first = F.scaled_dot_product_attention(q[:, :, begun], k[:, :, begun], v[:, :, begun], is_causal=True)
    padding = (0, 0, 0, -tokens % window)
    rest = F.pad(q[:, :, window:], padding).unflatten(2, (-1, window))  # [B, H, N, W, D]
    k, v = (F.pad(part, padding).unfold(2, 2 * window, window).transpose(-1, -2) for part in (k, v))
    mask = _near(window, 2 * window, window=window, device=q.device)
    # Blocks beside the heads: kernels of attention take four dimensions.
    q, k, v = (part.flatten(1, 2) for part in (rest, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return torch.cat([first, y.reshape(rest.shape).flatten(2, 3)[:, :, : tokens - window]], dim=2)


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
