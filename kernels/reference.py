"""The token recurrence, differentiated by autograd: the definition every other backend is measured against.

Tokens are 0-based, S_t includes token t, t' is the last token before t's chunk (chunks of C, counted from
each document's start), J the Jacobian of phi:

    u_t = J_phi(S_t' k_t)^T (phi(S_t' k_t) - alpha_t)      w_t = J_phi(R_t' v_t)^T (phi(R_t' v_t) - alpha_t)
    S_t = beta_t S_{t-1} - gamma_t u_t k_t^T               R_t = beta_t R_{t-1} - gamma_t w_t v_t^T
    y_t = R_t^T f(S_t q_t)

Nothing here is clever and nothing is shared with the chunkwise form: the Jacobian comes from torch.func.vjp,
the activations are written out.

Shapes: q, k [B, T, H, D]; v [B, T, H, V]; alpha [B, T, H, M]; gates [B, T, H]; memories [N, H, M, .].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.layout import PackedLayout

__all__ = ["reference"]


def reference(
    operands: tuple[Tensor, ...],
    initial: tuple[Tensor, Tensor],
    stale: tuple[Tensor, Tensor] | None,
    *,
    layout: PackedLayout,
    phi: str,
    readout: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Output, final memories and final chunk-start pair; arguments as in ``kernels.chunkwise.chunkwise``."""
    dtype = initial[0].dtype
    flat = [x.flatten(0, 1).to(dtype) for x in operands]  # [B * T, H, .]
    stale = initial if stale is None else stale
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    begin = 0
    for n, (length, offset) in enumerate(zip(layout.lengths, layout.offsets, strict=True)):
        tokens = [x[begin : begin + length] for x in flat]
        before = (initial[0][n], initial[1][n], stale[0][n], stale[1][n])
        y, after = _document(tokens, before, offset, layout.chunk_size, _PHI[phi], _READOUT[readout])
        outputs.append(y)
        states.append(after)
        begin += length
    key, value, key_start, value_start = (torch.stack(x) for x in zip(*states, strict=True))
    y = torch.cat(outputs).view_as(operands[2]).to(operands[2].dtype)
    return y, (key, value), (key_start, value_start)


def _document(
    tokens: list[Tensor],
    state: tuple[Tensor, ...],
    offset: int,
    chunk_size: int,
    phi: Callable[[Tensor], Tensor],
    f: Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One document: tokens [T, H, .], state (S, R, S', R') [H, M, .]."""
    S, R, S_start, R_start = state
    outputs = []
    for t, (q, k, v, alpha, log_decay, step) in enumerate(zip(*tokens, strict=True)):
        if (offset + t) % chunk_size == 0:
            S_start, R_start = S, R
        beta, gamma = log_decay.exp()[:, None, None], step[:, None, None]  # [H, 1, 1]
        u = _inner_gradient(_apply(S_start, k), alpha, phi)  # [H, M]
        w = _inner_gradient(_apply(R_start, v), alpha, phi)
        S = beta * S - gamma * u[:, :, None] * k[:, None, :]
        R = beta * R - gamma * w[:, :, None] * v[:, None, :]
        outputs.append(_apply(R.mT, f(_apply(S, q))))
    if (offset + len(outputs)) % chunk_size == 0:
        S_start, R_start = S, R
    return torch.stack(outputs), (S, R, S_start, R_start)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [H, i, j] times x [H, j]."""
    return (matrix @ x[:, :, None]).squeeze(-1)


def _inner_gradient(z: Tensor, alpha: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
    value, pull_back, *_ = torch.func.vjp(phi, z)
    gradient: Tensor = pull_back(value - alpha)[0]
    return gradient


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _ln_silu(x: Tensor) -> Tensor:
    s = _silu(x)
    centred = s - s.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def _l2_silu(x: Tensor) -> Tensor:
    s = _silu(x)
    return s / torch.sqrt((s**2).sum(-1, keepdim=True) + 1e-6)


def _softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True).detach())
    return e / e.sum(-1, keepdim=True)


_PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "tanh": torch.tanh,
    "identity": torch.clone,
    "ln_silu": _ln_silu,
    "softmax": _softmax,
}
_READOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "ln_silu": _ln_silu,
    "l2_silu": _l2_silu,
    "softmax": _softmax,
}
