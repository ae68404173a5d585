"""RWKV-7's generalised delta rule (Peng et al., arXiv 2503.14456).

    S_t = (diag(w_t) - (a_t o h_t) h_t^T) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

h, of unit norm, is the key whose value is taken out, at a rate a per channel; w decays every channel of the
keys. Unlike Gated DeltaNet's, what is taken out is read before the decay, and what is put in need not be
along it. (q is r in the paper, whose S is the transpose of ours.)

Chunkwise, rows of Q, K, V, H are a chunk's tokens, B = A o H, S the state before it. With the decays from the
chunk's start (D) and to its end (E), D' those from the start to before each token, and `scores` of
kernels.baselines.vector_decay, "before" those with the decay to before the reading token:

    U = -L^-1 (scores_before(H, K) V + (H o D') S)        L = I + scores_before(H, B)      (what is taken out)
    Y = (Q o D) S + scores(Q, K) V + scores(Q, B) U       S+ = diag(D_C) S + (K o E)^T V + (B o E)^T U

A read before token i's decay is one behind token i - 1's, so H goes in a row early, beside Q: one call.

Shapes: q, k, key = h, rate = a in [0, 1], log_decay = log w <= 0 [B, T, H, D]; v, y [B, T, H, V];
S [N, H, D, V].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype
from kernels.baselines.vector_decay import chunk_decays, scores
from kernels.layout import PackedLayout

__all__ = ["generalised_delta_rule"]


def generalised_delta_rule(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """The recurrence above; see `grid.Operation`. Tokens q, k, v, key, rate, log_decay."""
    grid = Grid(layout, compute_dtype(tokens["q"], tokens["k"], tokens["v"]))
    q, k, rate = (grid.reads(tokens[name]) for name in ("q", "k", "rate"))
    v, key, log_decay = (grid.writes(tokens[name]) for name in ("v", "key", "log_decay"))
    since, until = chunk_decays(log_decay)
    given = rate * key
    by_queries, keys_on_keys, keys_on_given = _pairs(q, key, k, given, log_decay)
    taken = key * F.pad(since[..., :-1, :], (0, 0, 1, 0), value=1.0)
    # One substitution for both right-hand sides; the diagonal of ones is implied.
    right = -torch.cat([keys_on_keys @ v, taken], dim=-1)
    solved = torch.linalg.solve_triangular(keys_on_given, right, upper=False, unitriangular=True)
    of_values, of_state = solved.split([v.shape[-1], key.shape[-1]], dim=-1)
    kept, put, taken_out = since[..., -1, :, None], (k * until).mT @ v, (given * until).mT

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        (state,) = now
        u = of_values[chunks] + of_state[chunks] @ state
        return (state * kept[chunks] + put[chunks] + taken_out[chunks] @ u,), (state, u)

    (before, u), final = grid.scan(step, memory)
    written = torch.stack([v, u], dim=-2).flatten(-3, -2)
    return grid.tokens((q * since) @ before + by_queries @ written, tokens["v"]), final


def _pairs(
    q: Tensor, key: Tensor, k: Tensor, given: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token reads of its chunk, all [P, H, C, D]: ``scores``, ``scores_before`` of (k, given).

    Returns:
        Of q with k and given in turns [P, H, C, 2 C]; of key with k, of key with given [P, H, C, C].
    """
    early = F.pad(key[..., 1:, :], (0, 0, 0, 1))
    a = scores(torch.stack([q, early], dim=-2), torch.stack([k, given], dim=-2), log_decay)
    by_queries, late = a.unflatten(-2, (-1, 2)).unbind(-2)
    by_keys = F.pad(late[..., :-1, :], (0, 0, 1, 0)).unflatten(-1, (-1, 2))
    return by_queries, by_keys[..., 0], by_keys[..., 1]
