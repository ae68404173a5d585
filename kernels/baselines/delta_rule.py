"""The delta rule and the gated delta rule (Yang et al., arXiv 2406.06484 and 2412.06464).

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T        y_t = S_t^T q_t

a = 1 is DeltaNet. Unlike Trellis with phi = identity, the error v - S^T k is taken of the decayed state.

Chunkwise, rows of Q, K, V are a chunk's tokens, l = cumsum(log a) inside it, mu = e^l, S the state before it:

    L = I + strictlower(diag(b) (K K^T) o Omega)      U = L^-1 diag(b) V      W = L^-1 diag(b mu) K
    E = U - W S                                       (what the chunk's tokens write)
    Y = diag(mu) Q S + ((Q K^T) o Omega) E            S+ = e^{l_C} S + (diag(e^{l_C - l}) K)^T E

Shapes: q, k [B, T, H, D], k of unit norm; v, y [B, T, H, V]; log_decay = log a <= 0 and beta = b in [0, 1]
(or [0, 2]: negative eigenvalues) [B, T, H]; S [N, H, D, V].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.baselines.grid import Grid, Memory, compute_dtype, decay_matrix
from kernels.layout import PackedLayout

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """The recurrence above; see `grid.Operation`. Tokens q, k, v, beta; log_decay where there is a decay."""
    grid = Grid(layout, compute_dtype(tokens["q"], tokens["k"], tokens["v"]))
    q, k, v = (grid.reads(tokens[name]) for name in ("q", "k", "v"))
    beta = grid.scalars(tokens["beta"])[..., None]
    if "log_decay" in tokens:
        cumulative = grid.scalars(tokens["log_decay"]).cumsum(-1)
    else:
        cumulative = torch.zeros_like(beta[..., 0])
    omega, end = decay_matrix(cumulative), cumulative[..., -1:]
    mu, total = cumulative.exp()[..., None], end.exp()[..., None]
    lower = (beta * (k @ k.mT) * omega).tril(-1)
    # One substitution for both right-hand sides; the diagonal of ones is implied.
    right = torch.cat([beta * v, beta * mu * k], dim=-1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    values, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    tail = (k * (end - cumulative).exp()[..., None]).mT

    def step(now: Memory, chunks: slice) -> tuple[Memory, Memory]:
        (state,) = now
        written = values[chunks] - erased[chunks] @ state
        return (state * total[chunks] + tail[chunks] @ written,), (state, written)

    (before, written), final = grid.scan(step, memory)
    y = (mu * q) @ before + ((q @ k.mT) * omega) @ written
    return grid.tokens(y, tokens["v"]), final
