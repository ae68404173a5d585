# mypy: allow-untyped-defs, allow-incomplete-defs
"""The readout, forward and backward: parallel over chunks, heads and tiles of BT tokens.

Shapes and equations as in ``kernels.stages``; U' = gamma U and W' = gamma W are the writes.

    forward         Yhat = mu Q S^T - ((Q K^T) o Omega) U';  P = f(Yhat);  Y = mu P R - ((P W'^T) o Omega) V
    by query tile   dP = mu dY R^T - ((dY V^T) o Omega) W';  dYhat = J_f^T dP;
                    dQ = mu dYhat S - ((dYhat U'^T) o Omega) K;  dl = Q.dQ + P.dP
    by key tile     dV = -((P W'^T) o Omega)^T dY;  dW' = -((dY V^T) o Omega)^T P
                    dK = -((dYhat U'^T) o Omega)^T Q;  dU' = -((Q K^T) o Omega)^T dYhat

A query tile meets the key tiles up to its own, a key tile the query tiles from its own on; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.activations import apply_readout, readout_backward
from kernels.triton.tiles import (
    dot,
    load_memory,
    load_scratch,
    load_tokens,
    omega,
    store_scratch,
    store_tokens,
)

__all__ = ["key_backward_kernel", "query_backward_kernel", "readout_forward_kernel"]


@triton.jit
def _gates(log_decay, step, chunk_head, j, length, C: tl.constexpr):
    """(l, mu, gamma) of slots j; all zero where there is no token."""
    valid = j < length
    logs = tl.load(log_decay + chunk_head * C + j, mask=valid, other=0.0)
    gamma = tl.load(step + chunk_head * C + j, mask=valid, other=0.0)
    return logs, tl.where(valid, tl.exp(logs), 0.0), gamma


@triton.jit
def _first_pass(
    Q,
    logs,
    mu,
    i,
    tile,
    key,
    gradient,
    start,
    log_decay,
    step,
    chunk_head,
    token,
    length,
    head,
    heads,
    D: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Yhat [BT, BM] of a query tile."""
    slots = tl.arange(0, BM)
    S = load_memory(start, chunk_head, slots, M, D, BD)
    y_hat = dot(Q * mu[:, None], tl.trans(S), PRECISION)
    for t in range(0, tile + 1):
        j = t * BT + tl.arange(0, BT)
        K = load_tokens(key, token, j, j < length, head, heads, D, BD)
        logs_j, _, gamma = _gates(log_decay, step, chunk_head, j, length, C)
        write = load_scratch(gradient, chunk_head, j, slots, C, M) * gamma[:, None]
        scores = dot(Q, tl.trans(K), PRECISION) * omega(logs, logs_j, i, j, length)
        y_hat -= dot(scores, write, PRECISION)
    return y_hat


@triton.jit
def readout_forward_kernel(
    query,
    key,
    value,
    log_decay,
    step,
    key_start,
    value_start,
    key_gradient,
    value_gradient,
    y,
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
    READOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P * H, ceil(C / BT)): y in token order."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk, head = chunk_head // heads, chunk_head % heads
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    i, slots = tile * BT + tl.arange(0, BT), tl.arange(0, BM)
    Q = load_tokens(query, token, i, i < length, head, heads, D, BD)
    logs, mu, _ = _gates(log_decay, step, chunk_head, i, length, C)
    y_hat = _first_pass(
        Q,
        logs,
        mu,
        i,
        tile,
        key,
        key_gradient,
        key_start,
        log_decay,
        step,
        chunk_head,
        token,
        length,
        head,
        heads,
        D,
        M,
        C,
        BD,
        BM,
        BT,
        PRECISION,
    )
    P = apply_readout(y_hat, (slots < M)[None, :], M * 1.0, READOUT)
    Y = dot(P * mu[:, None], load_memory(value_start, chunk_head, slots, M, V, BV), PRECISION)
    for t in range(0, tile + 1):
        j = t * BT + tl.arange(0, BT)
        X = load_tokens(value, token, j, j < length, head, heads, V, BV)
        logs_j, _, gamma = _gates(log_decay, step, chunk_head, j, length, C)
        write = load_scratch(value_gradient, chunk_head, j, slots, C, M) * gamma[:, None]
        scores = dot(P, tl.trans(write), PRECISION) * omega(logs, logs_j, i, j, length)
        Y -= dot(scores, X, PRECISION)
    store_tokens(y, Y, token, i, i < length, head, heads, V, BV)


@triton.jit
def query_backward_kernel(
    query,
    key,
    value,
    dy,
    log_decay,
    step,
    key_start,
    value_start,
    key_gradient,
    value_gradient,
    dquery,
    p,
    dy_hat,
    dlog,
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
    READOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P * H, ceil(C / BT)): dQ in token order; P, dYhat and Q.dQ + P.dP in chunk order."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk, head = chunk_head // heads, chunk_head % heads
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    i, slots = tile * BT + tl.arange(0, BT), tl.arange(0, BM)
    keep = (slots < M)[None, :]
    Q = load_tokens(query, token, i, i < length, head, heads, D, BD)
    dY = load_tokens(dy, token, i, i < length, head, heads, V, BV)
    logs, mu, _ = _gates(log_decay, step, chunk_head, i, length, C)
    y_hat = _first_pass(
        Q,
        logs,
        mu,
        i,
        tile,
        key,
        key_gradient,
        key_start,
        log_decay,
        step,
        chunk_head,
        token,
        length,
        head,
        heads,
        D,
        M,
        C,
        BD,
        BM,
        BT,
        PRECISION,
    )
    P = apply_readout(y_hat, keep, M * 1.0, READOUT)
    dP = dot(dY * mu[:, None], tl.trans(load_memory(value_start, chunk_head, slots, M, V, BV)), PRECISION)
    for t in range(0, tile + 1):
        j = t * BT + tl.arange(0, BT)
        X = load_tokens(value, token, j, j < length, head, heads, V, BV)
        logs_j, _, gamma = _gates(log_decay, step, chunk_head, j, length, C)
        write = load_scratch(value_gradient, chunk_head, j, slots, C, M) * gamma[:, None]
        dscores = dot(dY, tl.trans(X), PRECISION) * omega(logs, logs_j, i, j, length)
        dP -= dot(dscores, write, PRECISION)
    dY_hat = readout_backward(y_hat, dP, keep, M * 1.0, READOUT)
    dQ = dot(dY_hat * mu[:, None], load_memory(key_start, chunk_head, slots, M, D, BD), PRECISION)
    for t in range(0, tile + 1):
        j = t * BT + tl.arange(0, BT)
        K = load_tokens(key, token, j, j < length, head, heads, D, BD)
        logs_j, _, gamma = _gates(log_decay, step, chunk_head, j, length, C)
        write = load_scratch(key_gradient, chunk_head, j, slots, C, M) * gamma[:, None]
        dscores = dot(dY_hat, tl.trans(write), PRECISION) * omega(logs, logs_j, i, j, length)
        dQ -= dot(dscores, K, PRECISION)
    store_tokens(dquery, dQ, token, i, i < length, head, heads, D, BD)
    store_scratch(p, P, chunk_head, i, slots, C, M)
    store_scratch(dy_hat, dY_hat, chunk_head, i, slots, C, M)
    tl.store(dlog + chunk_head * C + i, tl.sum(Q * dQ, 1) + tl.sum(P * dP, 1), mask=i < C)


@triton.jit
def key_backward_kernel(
    query,
    key,
    value,
    dy,
    log_decay,
    step,
    key_gradient,
    value_gradient,
    p,
    dy_hat,
    dkey,
    dvalue,
    key_write,
    value_write,
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
    """Grid (P * H, ceil(C / BT)): the readout's part of dK, dV (chunk order), dU' and dW'."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk, head = chunk_head // heads, chunk_head % heads
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    j, slots = tile * BT + tl.arange(0, BT), tl.arange(0, BM)
    K = load_tokens(key, token, j, j < length, head, heads, D, BD)
    X = load_tokens(value, token, j, j < length, head, heads, V, BV)
    logs, _, gamma = _gates(log_decay, step, chunk_head, j, length, C)
    U = load_scratch(key_gradient, chunk_head, j, slots, C, M) * gamma[:, None]
    W = load_scratch(value_gradient, chunk_head, j, slots, C, M) * gamma[:, None]
    dK, dV = tl.zeros((BT, BD), dtype=tl.float32), tl.zeros((BT, BV), dtype=tl.float32)
    dU, dW = tl.zeros((BT, BM), dtype=tl.float32), tl.zeros((BT, BM), dtype=tl.float32)
    for t in range(tile, tl.cdiv(C, BT)):
        i = t * BT + tl.arange(0, BT)
        Q = load_tokens(query, token, i, i < length, head, heads, D, BD)
        dY = load_tokens(dy, token, i, i < length, head, heads, V, BV)
        P, dY_hat = (
            load_scratch(p, chunk_head, i, slots, C, M),
            load_scratch(dy_hat, chunk_head, i, slots, C, M),
        )
        logs_i, _, _ = _gates(log_decay, step, chunk_head, i, length, C)
        decay = omega(logs_i, logs, i, j, length)
        dV -= dot(tl.trans(dot(P, tl.trans(W), PRECISION) * decay), dY, PRECISION)
        dW -= dot(tl.trans(dot(dY, tl.trans(X), PRECISION) * decay), P, PRECISION)
        dK -= dot(tl.trans(dot(dY_hat, tl.trans(U), PRECISION) * decay), Q, PRECISION)
        dU -= dot(tl.trans(dot(Q, tl.trans(K), PRECISION) * decay), dY_hat, PRECISION)
    store_scratch(dkey, dK, chunk_head, j, tl.arange(0, BD), C, D)
    store_scratch(dvalue, dV, chunk_head, j, tl.arange(0, BV), C, V)
    store_scratch(key_write, dU, chunk_head, j, slots, C, M)
    store_scratch(value_write, dW, chunk_head, j, slots, C, M)
