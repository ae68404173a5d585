# mypy: allow-untyped-defs, allow-incomplete-defs
"""Local work around the scans: inner gradients recomputed, and the gradients of keys, values and gates.

Shapes as in ``kernels.stages``; X is K or V, S' the stale memory, dS+ the adjoint after the chunk. Parallel
over chunks, heads, tiles of BT tokens and the two memories.

    writes   U = J_phi(X S'^T)^T (phi(X S'^T) - A)
    inputs   E = -tail (gamma U) dS+;  dX = dX_readout + E + dZ S'
             row sums dX'.U (for dgamma) and X.E (for dl at the chunk's end)
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.activations import inner_gradient
from kernels.triton.tiles import dot, load_memory, load_scratch, load_tokens, store_scratch, store_tokens

__all__ = ["inputs_kernel", "writes_kernel"]


@triton.jit
def _writes_one(
    x,
    alpha,
    stale,
    gradient,
    first_token,
    lengths,
    heads,
    F: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PHI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk_head = tl.program_id(0).to(tl.int64)
    chunk, head = chunk_head // heads, chunk_head % heads
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    j, slots = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BM)
    valid = j < length
    X = load_tokens(x, token, j, valid, head, heads, F, BF)
    A = load_tokens(alpha, token, j, valid, head, heads, M, BM)
    Z = dot(X, tl.trans(load_memory(stale, chunk_head, slots, M, F, BF)), PRECISION)
    U = inner_gradient(Z, A, (slots < M)[None, :] & valid[:, None], M * 1.0, PHI)
    store_scratch(gradient, U, chunk_head, j, slots, C, M)


@triton.jit
def writes_kernel(
    key,
    value,
    alpha,
    key_stale,
    value_stale,
    key_gradient,
    value_gradient,
    first_token,
    lengths,
    heads,
    D: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PHI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P * H, ceil(C / BT), 2): U and W in chunk order."""
    if tl.program_id(2) == 0:
        _writes_one(
            key,
            alpha,
            key_stale,
            key_gradient,
            first_token,
            lengths,
            heads,
            D,
            M,
            C,
            BD,
            BM,
            BT,
            PHI,
            PRECISION,
        )
    else:
        _writes_one(
            value,
            alpha,
            value_stale,
            value_gradient,
            first_token,
            lengths,
            heads,
            V,
            M,
            C,
            BV,
            BM,
            BT,
            PHI,
            PRECISION,
        )


@triton.jit
def _inputs_one(
    x,
    stale,
    end,
    gradient,
    write,
    dz,
    dx_readout,
    log_decay,
    step,
    dx,
    step_sum,
    end_sum,
    first_token,
    lengths,
    heads,
    F: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk_head = tl.program_id(0).to(tl.int64)
    chunk, head = chunk_head // heads, chunk_head % heads
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    j, slots = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BM)
    valid = j < length
    X = load_tokens(x, token, j, valid, head, heads, F, BF)
    U = load_scratch(gradient, chunk_head, j, slots, C, M)
    logs = tl.load(log_decay + chunk_head * C + j, mask=valid, other=0.0)
    gamma = tl.load(step + chunk_head * C + j, mask=valid, other=0.0)
    log_end = tl.load(log_decay + chunk_head * C + C - 1)
    weight = tl.where(valid, gamma * tl.exp(tl.where(valid, log_end - logs, 0.0)), 0.0)
    E = -dot(U * weight[:, None], load_memory(end, chunk_head, slots, M, F, BF), PRECISION)
    dZ = load_scratch(dz, chunk_head, j, slots, C, M)
    dX = load_scratch(dx_readout, chunk_head, j, tl.arange(0, BF), C, F) + E
    dX += dot(dZ, load_memory(stale, chunk_head, slots, M, F, BF), PRECISION)
    store_tokens(dx, dX, token, j, valid, head, heads, F, BF)
    dwrite = load_scratch(write, chunk_head, j, slots, C, M)
    tl.store(step_sum + chunk_head * C + j, tl.sum(dwrite * U, 1), mask=j < C)
    tl.store(end_sum + chunk_head * C + j, tl.sum(X * E, 1), mask=j < C)


@triton.jit
def inputs_kernel(
    key,
    value,
    key_stale,
    value_stale,
    key_end,
    value_end,
    key_gradient,
    value_gradient,
    key_write,
    value_write,
    key_dz,
    value_dz,
    key_readout,
    value_readout,
    log_decay,
    step,
    dkey,
    dvalue,
    key_step_sum,
    value_step_sum,
    key_end_sum,
    value_end_sum,
    first_token,
    lengths,
    heads,
    D: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P * H, ceil(C / BT), 2): dK, dV in token order and two row sums [P, H, C] per memory."""
    if tl.program_id(2) == 0:
        _inputs_one(
            key,
            key_stale,
            key_end,
            key_gradient,
            key_write,
            key_dz,
            key_readout,
            log_decay,
            step,
            dkey,
            key_step_sum,
            key_end_sum,
            first_token,
            lengths,
            heads,
            D,
            M,
            C,
            BD,
            BM,
            BT,
            PRECISION,
        )
    else:
        _inputs_one(
            value,
            value_stale,
            value_end,
            value_gradient,
            value_write,
            value_dz,
            value_readout,
            log_decay,
            step,
            dvalue,
            value_step_sum,
            value_end_sum,
            first_token,
            lengths,
            heads,
            V,
            M,
            C,
            BV,
            BM,
            BT,
            PRECISION,
        )
