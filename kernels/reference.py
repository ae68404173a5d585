"""The token recurrence, differentiated by autograd: the definition every other backend is measured against.

Tokens are 0-based, S_t includes token t, t' is the last token before t's chunk (chunks of C, counted from
each document's start), J the Jacobian of phi:

    stale        z_t = S_t' k_t;               u_t = J_phi(z_t)^T (phi(z_t) - alpha_t)
    corrected    z_t = (prod beta) S_t' k_t
                 u_t = J_phi(z_t)^T (phi(z_t) - alpha_t) + beta_t S_{t-1} k_t - z_t
                 with the product over the chunk's tokens up to t
    S_t = beta_t S_{t-1} - gamma_t u_t k_t^T

R and w_t are the same for the values v_t, with the value pass's own gates where it has them, and

    y_t = R_t^T (w f(S_t q_t) + b)             silu: y_t = R_t^T SiLU(w S_t q_t + b)
                                               silu_rms: y_t = R_t^T SiLU(w S_t q_t / rms(S_t q_t) + b)

Nothing here is clever and nothing is shared with the chunkwise form: the Jacobian comes from torch.func.vjp,
the activations are written out.

Shapes: q, k [B, T, H, D]; v [B, T, H, V]; alpha [B, T, H, M]; gates [B, T, H]; w, b [H, M]; memories
[N, H, M, .]. The carried chunk-start memory is what z_t is computed from: decayed with every token under
"corrected", constant inside a chunk under "stale".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.layout import PackedLayout
from kernels.types import Memories, Operands, Rule

__all__ = ["reference"]


def reference(
    operands: Operands,
    initial: Memories,
    stale: Memories | None,
    *,
    layout: PackedLayout,
    rule: Rule,
) -> tuple[Tensor, Memories, Memories]:
    """Output [B, T, H, V], final memories and final chunk-start pair [N, H, M, .]; see ``compress_kv``."""
    dtype = initial.key.dtype
    flat = [None if x is None else x.flatten(0, 1).to(dtype) for x in operands[:8]]  # [B * T, H, .]
    affine = [None if x is None else x.to(dtype) for x in operands[8:]]
    stale = initial if stale is None else stale
    outputs: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    begin = 0
    for n, (length, offset) in enumerate(zip(layout.lengths, layout.offsets, strict=True)):
        tokens = [None if x is None else x[begin : begin + length] for x in flat]
        before = (initial.key[n], initial.value[n], stale.key[n], stale.value[n])
        y, after = _document(Operands(*tokens, *affine), before, offset, layout.chunk_size, rule)  # type: ignore[arg-type]
        outputs.append(y)
        states.append(after)
        begin += length
    key, value, key_start, value_start = (torch.stack(x) for x in zip(*states, strict=True))
    y = torch.cat(outputs).view_as(operands.v).to(operands.v.dtype)
    return y, Memories(key, value), Memories(key_start, value_start)


def _document(
    x: Operands, state: tuple[Tensor, ...], offset: int, chunk_size: int, rule: Rule
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One document: operands [T, H, .], state (S, R, S', R') [H, M, .]."""
    S, R, S_start, R_start = state
    value_decay = x.log_decay if x.value_log_decay is None else x.value_log_decay
    value_step = x.step_size if x.value_step_size is None else x.value_step_size
    outputs = []
    for t in range(len(x.q)):
        if (offset + t) % chunk_size == 0:
            S_start, R_start = S, R
        S, S_start = _write(S, S_start, x.k[t], x.alpha[t], x.log_decay[t], x.step_size[t], rule)
        R, R_start = _write(R, R_start, x.v[t], x.alpha[t], value_decay[t], value_step[t], rule)
        p = _readout(_apply(S, x.q[t]), rule.readout, x.readout_weight, x.readout_bias)
        outputs.append(_apply(R.mT, p))
    if (offset + len(outputs)) % chunk_size == 0:
        S_start, R_start = S, R
    return torch.stack(outputs), (S, R, S_start, R_start)


def _write(
    memory: Tensor,
    start: Tensor,
    x: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """One token into one memory [H, M, F]: the new memory and what the chunk's next z is computed from."""
    beta, gamma = log_decay.exp()[:, None, None], step[:, None, None]
    if rule.corrected:
        start = beta * start
    z = _apply(start, x)
    u = _inner_gradient(z, alpha, _PHI[rule.phi])
    if rule.corrected:
        u = u + _apply(beta * memory, x) - z
    return beta * memory - gamma * u[:, :, None] * x[:, None, :], start


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


def _unit_rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)


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
    "silu": torch.clone,
    "silu_rms": _unit_rms,
}


def _readout(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    h = _READOUT[name](x)
    h = h if weight is None else weight * h
    h = h if bias is None else h + bias
    return _silu(h) if name in ("silu", "silu_rms") else h
