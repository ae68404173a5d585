"""Linear attention with a decay per head and token: linear attention, and Mamba2's state-space duality.

    S_t = a_t S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

a = 1 is linear attention (Katharopoulos et al., arXiv 2006.16236, without its normaliser, as in arXiv
2307.08621 and 2312.06635); a_t = exp(-exp(A) dt_t), k = B, q = C, v = dt x is
Mamba2 (Dao and Gu, arXiv 2405.21060, section 6).

Chunkwise, rows of Q, K, V are a chunk's tokens, l = cumsum(log a) inside it, mu = e^l, S the state before it:

    Y = diag(mu) Q S + ((Q K^T) o Omega) V        S+ = e^{l_C} S + (diag(e^{l_C - l}) K)^T V

Shapes: q, k [B, T, H, D]; v, y [B, T, H, V]; log_decay = log a <= 0 [B, T, H]; S [N, H, D, V].
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype, decay_matrix
from kernels.layout import PackedLayout

__all__ = ["decayed_linear_attention"]


def decayed_linear_attention(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """The recurrence above; see `grid.Operation`. Tokens q, k, v and, where there is a decay, log_decay."""
    grid = Grid(layout, compute_dtype(tokens["q"], tokens["k"], tokens["v"]))
    q, k, v = grid.reads(tokens["q"]), grid.reads(tokens["k"]), grid.writes(tokens["v"])
    scores = q @ k.mT
    if "log_decay" in tokens:
        cumulative = grid.scalars(tokens["log_decay"]).cumsum(-1)
        end = cumulative[..., -1:]
        scores, q = scores * decay_matrix(cumulative), q * cumulative.exp()[..., None]
        k, total = k * (end - cumulative).exp()[..., None], end.exp()[..., None]
    else:
        scores, total = scores.tril(), None
    writes = k.mT @ v  # of each chunk on its own; only the sums over chunks wait for each other

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        (state,) = now
        kept = state if total is None else state * total[chunks]
        return (kept + writes[chunks],), (state,)

    (before,), final = grid.scan(step, memory)
    return grid.tokens(q @ before + scores @ v, tokens["v"]), final
