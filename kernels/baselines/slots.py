"""Attention over memory slots: ABC (Peng et al., arXiv 2110.02488) and GSA (Zhang et al., arXiv 2409.07146).

    S_t = S_{t-1} diag(a_t) + k_t w_t^T          R_t = diag(a_t) R_{t-1} + w_t v_t^T
    y_t = R_t^T softmax(S_t^T q_t)

M slots per head, each with its own decay a and write strength w, of keys and values alike. GSA: w = 1 - a.
ABC: slot m holds the mean of all keys and values weighted with e^s, s the token's score for the slot:

    z_t = log(e^{z_{t-1}} + e^{s_t})          a_t = e^{z_{t-1} - z_t}          w_t = e^{s_t - z_t}

z is carried as a log, so no score overflows; before the first token it is -inf, and that token's a is 0 and
w is 1. flash-linear-attention writes ABC so (fla.ops.abc), but takes a = 1 for the first token of every call:
the same while the memory before it is 0.

Chunkwise, rows of Q, K, V, W are a chunk's tokens, S and R the memories before it, and with the decays from
the chunk's start (A) and to its end (E) and `scores`, `mix` of kernels.baselines.vector_decay:

    P = softmax((Q S) o A + mix(Q K^T, W))            S+ = S diag(A_C) + K^T (W o E)
    Y = (P o A) R + scores(P, W) V                    R+ = diag(A_C) R + (W o E)^T V

Shapes: q, k [B, T, H, D]; v, y [B, T, H, V]; log_decay = log a <= 0, write = w, or scores = s [B, T, H, M];
memories S [N, H, D, M], R [N, H, M, V], and ABC's z [N, H, M].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype
from kernels.baselines.vector_decay import chunk_decays, mix, scores
from kernels.layout import PackedLayout

__all__ = ["bounded_memory_attention", "gated_slot_attention"]

# The score of a pad: writes nothing, and unlike -inf has no difference from another that is NaN.
SILENT = -1e30


def gated_slot_attention(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """GSA; see `grid.Operation`. Tokens q, k, v, write, log_decay; memories S and R."""
    grid = Grid(layout, compute_dtype(tokens["q"], tokens["k"], tokens["v"]))
    write, log_decay = grid.writes(tokens["write"]), grid.writes(tokens["log_decay"])
    return _two_passes(grid, tokens, write, log_decay, memory)


def bounded_memory_attention(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """ABC; see `grid.Operation`. Tokens q, k, v, scores; memories S, R and z, -inf before the first token."""
    grid = Grid(layout, compute_dtype(tokens["q"], tokens["k"], tokens["v"]))
    slot_scores = grid.writes(tokens["scores"], pads=SILENT)
    within = _running_logsumexp(slot_scores)

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        (z,) = now
        return (torch.logaddexp(z, within[chunks, :, -1]),), (z,)

    (entering,), (z_end,) = grid.scan(step, memory[2:])
    z = torch.logaddexp(entering.unsqueeze(-2), within)
    log_decay = torch.cat([entering.unsqueeze(-2), z[..., :-1, :]], dim=-2) - z
    y, final = _two_passes(grid, tokens, (slot_scores - z).exp(), log_decay, memory[:2])
    return y, (*final, z_end)


def _running_logsumexp(s: Tensor) -> Tensor:
    """log sum_{j <= i} e^{s_j} over the tokens of chunks [P, H, C, M], by doubling.

    torch.logcumsumexp goes through tokens and channels one by one, and several times in its backward pass.
    """
    size = s.shape[-2]
    z, width = F.pad(s, (0, 0, 0, (1 << (size - 1).bit_length()) - size)), 1
    while width < size:
        first, second = z.unflatten(-2, (-1, 2, width)).unbind(-3)
        z = torch.stack([first, torch.logaddexp(second, first[..., -1:, :])], dim=-3).flatten(-4, -2)
        width *= 2
    return z[..., :size, :]


def _two_passes(
    grid: Grid, tokens: Mapping[str, Tensor], write: Tensor, log_decay: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """Read the keys' slots, softmax, read the values' slots; write and log_decay [P, H, C, M], 0 on pads."""
    q, k, v = (grid.reads(tokens[name]) for name in ("q", "k", "v"))
    since, until = chunk_decays(log_decay)
    kept, written = since[..., -1:, :], write * until
    add_keys, add_values = k.mT @ written, written.mT @ v

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        keys, values = now
        decay = kept[chunks]
        return (keys * decay + add_keys[chunks], values * decay.mT + add_values[chunks]), (keys, values)

    (keys, values), final = grid.scan(step, memory)
    write = write.unsqueeze(-2)
    logits = (q @ keys) * since + mix(q @ k.mT, write, log_decay).squeeze(-2)
    p = logits.softmax(-1)
    y = (p * since) @ values + scores(p.unsqueeze(-2), write, log_decay) @ v
    return grid.tokens(y, tokens["v"]), final
