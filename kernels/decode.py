"""decode_step: the operation for one token per sequence; time and memory do not depend on the position.

With the state (S, R), the chunk-start pair (S', R') and o tokens of the current chunk consumed:

    S', R' = S, R where o = 0
    u = J_phi(S' k)^T (phi(S' k) - alpha)             w = J_phi(R' v)^T (phi(R' v) - alpha)
    S = beta S - gamma u k^T                          R = beta R - gamma w v^T
    y = R^T f(S q);   o = (o + 1) mod C

Shapes: q, k [B, H, D]; v, y [B, H, V]; alpha [B, H, M]; log_decay, step_size [B, H]; memories [B, H, M, .].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activations import apply_readout, inner_gradient
from kernels.compress import CompressState, check_choices, check_operands, check_state, stale_pair

__all__ = ["decode_step"]


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    state: CompressState,
    *,
    chunk_size: int,
    phi: str = "silu",
    readout: str = "ln_silu",
) -> tuple[Tensor, CompressState]:
    """Consume one token of every sequence.

    Args:
        q, k, v, alpha, log_decay, step_size: operands of the token, without the T dimension of
            ``compress_kv``.
        state: of the tokens before; the step leaves it untouched.
        chunk_size, phi, readout: as in ``compress_kv``.

    Returns:
        y [B, H, V] in v's dtype, and the state after the token.

    Raises:
        ValueError: as in ``compress_kv``.
    """
    check_operands((q, k, v, alpha, log_decay, step_size), dims="B, H")
    check_choices(phi=phi, readout=readout)
    check_state(state, q, v, alpha, q.shape[0])
    offsets = (state.offset,) if isinstance(state.offset, int) else state.offset
    if any(not 0 <= o < chunk_size for o in offsets):
        raise ValueError(
            f"state.offset = {state.offset}: it counts tokens of a chunk, so it is in [0, {chunk_size})"
        )
    with torch.autocast(device_type=q.device.type, enabled=False):
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype, alpha.dtype) else torch.float32
        S, R = state.key_memory.to(dtype), state.value_memory.to(dtype)
        S_start, R_start = stale_pair(state, (S, R)) or (S, R)
        alpha = alpha.to(dtype)
        beta, gamma = log_decay.to(dtype).exp()[..., None, None], step_size.to(dtype)[..., None]
        S = beta * S - _write(S_start, k.to(dtype), alpha, gamma, phi)
        R = beta * R - _write(R_start, v.to(dtype), alpha, gamma, phi)
        p = apply_readout(_apply(S, q.to(dtype)), readout)
        y = _apply(R.mT, p).to(v.dtype)
    return y, _advance(state, (S, R), (S_start, R_start), chunk_size)


def _write(start: Tensor, x: Tensor, alpha: Tensor, gamma: Tensor, phi: str) -> Tensor:
    """gamma u x^T [B, H, M, F]."""
    u = inner_gradient(_apply(start, x), alpha, phi)
    return (gamma * u)[..., :, None] * x[..., None, :]


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [B, H, i, j] times x [B, H, j]."""
    return (matrix @ x[..., None]).squeeze(-1)


def _advance(
    state: CompressState, memories: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], chunk_size: int
) -> CompressState:
    offset: int | tuple[int, ...]
    if isinstance(state.offset, int):
        offset = (state.offset + 1) % chunk_size
        start = start if offset else memories
    else:
        offset = tuple((o + 1) % chunk_size for o in state.offset)
    return CompressState(memories[0], memories[1], start[0], start[1], offset)
