# mypy: allow-untyped-defs, allow-incomplete-defs
"""The two scans: states forward, adjoints backward, sequential over a document's chunks.

Shapes as in ``kernels.stages``. One program carries one block of BM slots of one memory (key or value) of one
head of one document; both memories share a launch. With elementwise phi the slots are independent, so the
grid is 2 * N * H * ceil(M / BM) programs; the row-wise phi need BM >= M.

    forward   Z = X S'^T;  U = J_phi(Z)^T (phi(Z) - A);  S+ = e^{l_C} S - (gamma tail U)^T X
    backward  dX' = dX'_readout - tail X dS+^T;  (dZ, dA) = inner_backward(Z, A, gamma dX')
              dS  = e^{l_C} dS+ + L^T (mu Y) + dZ^T X
              key memory: X = K, L = dYhat, Y = Q;  value memory: X = V, L = P, Y = dY

A chunk is walked in tiles of BT tokens: inside it every token sees the same stale memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.activations import inner_backward, inner_gradient
from kernels.triton.tiles import (
    dot,
    load_memory,
    load_scratch,
    load_tokens,
    store_memory,
    store_scratch,
)

__all__ = ["scan_backward_kernel", "scan_forward_kernel"]


@triton.jit
def _forward_one(
    x,
    alpha,
    log_decay,
    step,
    initial,
    pair,
    start,
    final,
    gradient,
    first_token,
    lengths,
    base,
    chunks_of,
    heads,
    F: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PHI: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rank, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    document = rank * heads + head
    slots = tl.program_id(2) * BM + tl.arange(0, BM)
    keep = (slots < M)[None, :]
    S = load_memory(initial, document, slots, M, F, BF)
    for i in range(0, tl.load(chunks_of + rank)):
        chunk = tl.load(base + i) + rank
        chunk_head = chunk * heads + head
        token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
        store_memory(start, S, chunk_head, slots, M, F, BF)
        at = S
        if HAS_PAIR:
            at = tl.where(i == 0, load_memory(pair, document, slots, M, F, BF), S)
        end = tl.load(log_decay + chunk_head * C + C - 1)
        S = S * tl.exp(end)
        for t in range(0, C, BT):
            j = t + tl.arange(0, BT)
            valid = j < length
            X = load_tokens(x, token, j, valid, head, heads, F, BF)
            A = tl.load(
                alpha + ((token + j) * heads + head)[:, None] * M + slots[None, :],
                mask=valid[:, None] & keep,
                other=0.0,
            ).to(tl.float32)
            logs = tl.load(log_decay + chunk_head * C + j, mask=valid, other=0.0)
            gamma = tl.load(step + chunk_head * C + j, mask=valid, other=0.0)
            U = inner_gradient(dot(X, tl.trans(at), PRECISION), A, keep & valid[:, None], M * 1.0, PHI)
            store_scratch(gradient, U, chunk_head, j, slots, C, M)
            weight = tl.where(valid, gamma * tl.exp(tl.where(valid, end - logs, 0.0)), 0.0)
            S -= dot(tl.trans(U * weight[:, None]), X, PRECISION)
    store_memory(final, S, document, slots, M, F, BF)


@triton.jit
def scan_forward_kernel(
    key,
    value,
    alpha,
    log_decay,
    step,
    key_initial,
    value_initial,
    key_pair,
    value_pair,
    key_start,
    value_start,
    key_final,
    value_final,
    key_gradient,
    value_gradient,
    first_token,
    lengths,
    base,
    chunks_of,
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
    HAS_PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (N * H, 2, ceil(M / BM)): memories before every chunk, final ones, inner gradients."""
    if tl.program_id(1) == 0:
        _forward_one(
            key,
            alpha,
            log_decay,
            step,
            key_initial,
            key_pair,
            key_start,
            key_final,
            key_gradient,
            first_token,
            lengths,
            base,
            chunks_of,
            heads,
            D,
            M,
            C,
            BD,
            BM,
            BT,
            PHI,
            HAS_PAIR,
            PRECISION,
        )
    else:
        _forward_one(
            value,
            alpha,
            log_decay,
            step,
            value_initial,
            value_pair,
            value_start,
            value_final,
            value_gradient,
            first_token,
            lengths,
            base,
            chunks_of,
            heads,
            V,
            M,
            C,
            BV,
            BM,
            BT,
            PHI,
            HAS_PAIR,
            PRECISION,
        )


@triton.jit
def _backward_one(
    x,
    alpha,
    log_decay,
    step,
    stale,
    left,
    right,
    write,
    extra,
    final,
    initial,
    pair,
    end,
    dz,
    dalpha,
    first_token,
    lengths,
    base,
    chunks_of,
    heads,
    F: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PHI: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rank, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    document = rank * heads + head
    slots = tl.program_id(2) * BM + tl.arange(0, BM)
    keep = (slots < M)[None, :]
    adjoint = load_memory(final, document, slots, M, F, BF)  # dS+
    count = tl.load(chunks_of + rank)
    for back in range(0, count):
        i = count - 1 - back
        chunk = tl.load(base + i) + rank
        chunk_head = chunk * heads + head
        token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
        store_memory(end, adjoint, chunk_head, slots, M, F, BF)
        at = load_memory(stale, chunk_head, slots, M, F, BF)
        log_end = tl.load(log_decay + chunk_head * C + C - 1)
        direct = adjoint * tl.exp(log_end)
        through = tl.zeros((BM, BF), dtype=tl.float32)  # adjoint of the stale memory
        if HAS_EXTRA:
            through = load_memory(extra, chunk_head, slots, M, F, BF)
        for t in range(0, C, BT):
            j = t + tl.arange(0, BT)
            valid = j < length
            X = load_tokens(x, token, j, valid, head, heads, F, BF)
            A = tl.load(
                alpha + ((token + j) * heads + head)[:, None] * M + slots[None, :],
                mask=valid[:, None] & keep,
                other=0.0,
            ).to(tl.float32)
            logs = tl.load(log_decay + chunk_head * C + j, mask=valid, other=0.0)
            gamma = tl.load(step + chunk_head * C + j, mask=valid, other=0.0)
            tail = tl.where(valid, tl.exp(tl.where(valid, log_end - logs, 0.0)), 0.0)
            mu = tl.where(valid, tl.exp(logs), 0.0)
            dwrite = load_scratch(write, chunk_head, j, slots, C, M)
            dwrite -= dot(X * tail[:, None], tl.trans(adjoint), PRECISION)
            store_scratch(write, dwrite, chunk_head, j, slots, C, M)
            Z = dot(X, tl.trans(at), PRECISION)
            dZ, dA = inner_backward(Z, A, gamma[:, None] * dwrite, keep & valid[:, None], M * 1.0, PHI)
            store_scratch(dz, dZ, chunk_head, j, slots, C, M)
            store_scratch(dalpha, dA, chunk_head, j, slots, C, M)
            L = load_scratch(left, chunk_head, j, slots, C, M)
            Y = load_tokens(right, token, j, valid, head, heads, F, BF)
            direct += dot(tl.trans(L * mu[:, None]), Y, PRECISION)
            through += dot(tl.trans(dZ), X, PRECISION)
        if HAS_PAIR:  # noqa: SIM102 - one branch is taken at compile time
            if i == 0:
                store_memory(pair, through, document, slots, M, F, BF)
                through = through * 0.0
        adjoint = direct + through
    store_memory(initial, adjoint, document, slots, M, F, BF)


@triton.jit
def scan_backward_kernel(
    key,
    value,
    alpha,
    log_decay,
    step,
    key_stale,
    value_stale,
    dy_hat,
    query,
    p,
    dy,
    key_write,
    value_write,
    key_extra,
    value_extra,
    key_final,
    value_final,
    key_initial,
    value_initial,
    key_pair,
    value_pair,
    key_end,
    value_end,
    key_dz,
    value_dz,
    key_dalpha,
    value_dalpha,
    first_token,
    lengths,
    base,
    chunks_of,
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
    HAS_PAIR: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (N * H, 2, ceil(M / BM)): adjoints after every chunk and of the initial memories, dZ, dA.

    The gradients of the writes are completed in place.
    """
    if tl.program_id(1) == 0:
        _backward_one(
            key,
            alpha,
            log_decay,
            step,
            key_stale,
            dy_hat,
            query,
            key_write,
            key_extra,
            key_final,
            key_initial,
            key_pair,
            key_end,
            key_dz,
            key_dalpha,
            first_token,
            lengths,
            base,
            chunks_of,
            heads,
            D,
            M,
            C,
            BD,
            BM,
            BT,
            PHI,
            HAS_PAIR,
            HAS_EXTRA,
            PRECISION,
        )
    else:
        _backward_one(
            value,
            alpha,
            log_decay,
            step,
            value_stale,
            p,
            dy,
            value_write,
            value_extra,
            value_final,
            value_initial,
            value_pair,
            value_end,
            value_dz,
            value_dalpha,
            first_token,
            lengths,
            base,
            chunks_of,
            heads,
            V,
            M,
            C,
            BV,
            BM,
            BT,
            PHI,
            HAS_PAIR,
            HAS_EXTRA,
            PRECISION,
        )
