# mypy: allow-untyped-defs, allow-incomplete-defs
"""The readout, forward and backward: parallel over chunks, heads and tiles of BT tokens.

Shapes and equations as in ``kernels.stages``. U' = gamma U and W' = gamma W are the writes; a product takes U
and the other factor takes gamma, so that U is rounded once and alike everywhere. Omega, mu and gamma are the
pass's own: the keys' in the first line of each, the values' in the second:

    forward         Yhat = mu Q S^T - ((Q K^T) o Omega) U';  P = readout(Yhat)
                    Y = mu P R - ((P W'^T) o Omega) V
    by query tile   dP = mu dY R^T - ((dY V^T) o Omega) W';  dYhat = J^T dP
                    dQ = mu dYhat S - ((dYhat U'^T) o Omega) K;  dl = Q.dQ (key), P.dP (value)
    by key tile     dU' = -((Q K^T) o Omega)^T dYhat;  dS = (mu dYhat)^T Q
                    dW' = -((dY V^T) o Omega)^T P;     dR = (mu P)^T dY;  dgamma = U.dU' (key), W.dW' (value)

Summed over a chunk, dl and gamma dgamma cancel but for what crosses from token to token. So both are sums of
one matrix of pairs, -(Q K^T) o Omega o (dYhat U^T), along its rows and its columns: U.dU' from a rounded dU'
would leave errors of the size of what cancels.

A query tile meets the key tiles up to its own, a key tile the query tiles from its own on; no atomics. Where
a chunk is one tile, the query kernel has the scores of the last two lines at hand and writes these as well.
The writes are recomputed from the chunk-start memory there, and come from the scan where a chunk has several
tiles or its writes depend on each other ("corrected"). Recomputing them takes the most registers, so the
term of the state comes last in every sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.triton.activations import apply_readout, inner_gradient, readout_backward
from kernels.triton.tiles import (
    dot,
    load_gates,
    load_memory,
    load_slots,
    load_tokens,
    omega,
    rounded,
    store_memory,
    store_slots,
    store_tokens,
    tile_length,
)

__all__ = ["Gradients", "key_backward_kernel", "query_backward_kernel", "readout_forward_kernel"]
__all__ += ["load_stale", "load_writes"]


class Gradients(NamedTuple):
    """What the backward kernels write.

    Attributes:
        query: dQ, token order.
        p, y_hat: P and dYhat [P, H, C, M].
        key_write, value_write: dU' and dW' [P, H, C, M].
        key_start, value_start: dS and dR [P, H, M, .].
        key_rows, value_rows: Q.dQ and P.dP [P, H, C].
        key_step, value_step: the readout's dgamma [P, H, C].
        weight, bias: each program's part of the affine's gradients [H, P, TILES, M]; None where it has none.
    """

    query: Any
    p: Any
    y_hat: Any
    key_write: Any
    value_write: Any
    key_start: Any
    value_start: Any
    key_rows: Any
    value_rows: Any
    key_step: Any
    value_step: Any
    weight: Any
    bias: Any


@triton.jit
def load_stale(m, chunk_head, documents, heads, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    """S' of a chunk: the memory at its start, in a document's first chunk the carried one."""
    S = load_memory(m.start, chunk_head, 0, None, F, BF, Z)
    if m.pair is not None:
        first = chunk_head < documents * heads  # chunk n is the first one of rank n
        S = tl.where(first, load_memory(m.pair, chunk_head, 0, first, F, BF, Z), S.to(tl.float32))
    return S


@triton.jit
def load_writes(m, alpha, t, tile, chunk_head, documents, heads, F, BF, Z: tl.constexpr):
    """(X, U, l, gamma) of a tile of keys."""
    head, chunk = chunk_head % heads, chunk_head // heads
    token, n = tl.load(t.token + chunk) + tile * Z.BT, tile_length(tl.load(t.length + chunk), tile, Z.BT)
    row = chunk_head * Z.C + tile * Z.BT
    X = load_tokens(m.x, token, n, head, heads, F, BF, Z.BT)
    logs, gamma = load_gates(m.log_decay, m.step, row, n, Z.BT)
    if m.gradient is not None:
        U = load_slots(m.gradient, row * Z.M, n, 0, Z.M, Z).to(tl.float32)
    else:
        A = load_slots(alpha, (token * heads + head) * Z.M, n, 0, heads * Z.M, Z).to(tl.float32)
        pre = dot(X, load_stale(m, chunk_head, documents, heads, F, BF, Z), Z.precision, TB=True)
        real = (tl.arange(0, Z.BM) < Z.M)[None, :] & (tl.arange(0, Z.BT) < n)[:, None]
        U = inner_gradient(pre, A, real, Z.M * 1.0, Z.phi, 1)
    return X, U, logs, gamma[None, :]


@triton.jit
def _decay(log_i, log_j, tile_i, tile_j, n, Z: tl.constexpr):
    """Omega between two tiles of a chunk; n tokens in that of the rows."""
    r = tl.arange(0, Z.BT)
    return omega(log_i, log_j, tile_i * Z.BT + r, tile_j * Z.BT + r, r < n)


@triton.jit
def _affine(x, head, NEUTRAL: tl.constexpr, Z: tl.constexpr):
    """A head's row of x [H, M] as [1, BM]; without one, NEUTRAL, which the compiler folds away."""
    s = tl.arange(0, Z.BM)[None, :]
    if x is None:
        row = tl.full((1, Z.BM), NEUTRAL, tl.float32)
    else:
        row = tl.load(x + head * Z.M + s, mask=s < Z.M, other=0.0).to(tl.float32)
    return row


@triton.jit
def _first_pass(Q, logs, n, key, alpha, t, tile, chunk_head, documents, heads, Z: tl.constexpr):
    """Yhat [BT, BM] of a query tile."""
    y_hat = tl.full((Z.BT, Z.BM), 0.0, tl.float32)
    for other in range(0, tile + 1):
        K, U, logs_j, gamma = load_writes(key, alpha, t, other, chunk_head, documents, heads, Z.D, Z.BD, Z)
        scores = dot(Q, K, Z.precision, TB=True) * _decay(logs, logs_j, tile, other, n, Z)
        y_hat -= dot(scores * gamma, U, Z.precision)
    S = load_memory(key.start, chunk_head, 0, None, Z.D, Z.BD, Z)
    return y_hat + dot(Q, S, Z.precision, TB=True) * tl.exp(logs)[:, None]


@triton.jit
def readout_forward_kernel(query, key, value, alpha, weight, bias, y, t, documents, heads, Z: tl.constexpr):
    """Grid (P * H, TILES): y in token order."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), 0
    if Z.TILES > 1:
        tile = tl.program_id(1)
    head, chunk = chunk_head % heads, chunk_head // heads
    token, n = tl.load(t.token + chunk) + tile * Z.BT, tile_length(tl.load(t.length + chunk), tile, Z.BT)
    row = chunk_head * Z.C + tile * Z.BT
    Q = load_tokens(query, token, n, head, heads, Z.D, Z.BD, Z.BT)
    logs, _ = load_gates(key.log_decay, key.step, row, n, Z.BT)
    y_hat = _first_pass(Q, logs, n, key, alpha, t, tile, chunk_head, documents, heads, Z)
    keep = (tl.arange(0, Z.BM) < Z.M)[None, :]
    w, b = _affine(weight, head, 1.0, Z), _affine(bias, head, -0.0, Z)
    P = apply_readout(y_hat, w, b, keep, Z.M * 1.0, Z.readout)
    logs, _ = load_gates(value.log_decay, value.step, row, n, Z.BT)
    Y = dot(P, load_memory(value.start, chunk_head, 0, None, Z.V, Z.BV, Z), Z.precision)
    Y = Y * tl.exp(logs)[:, None]
    for other in range(0, tile + 1):
        X, W, logs_j, gamma = load_writes(value, alpha, t, other, chunk_head, documents, heads, Z.V, Z.BV, Z)
        scores = dot(P, W, Z.precision, TB=True) * _decay(logs, logs_j, tile, other, n, Z)
        Y -= dot(scores * gamma, X, Z.precision)
    store_tokens(y, Y, token, n, head, heads, Z.V, Z.BV, Z.BT)


@triton.jit
def query_backward_kernel(
    query, key, value, dy, alpha, weight, bias, out, t, documents, heads, Z: tl.constexpr
):
    """Grid (P * H, TILES): all of ``out``, without the key tiles' part where a chunk has several."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), 0
    if Z.TILES > 1:
        tile = tl.program_id(1)
    head, chunk = chunk_head % heads, chunk_head // heads
    token, n = tl.load(t.token + chunk) + tile * Z.BT, tile_length(tl.load(t.length + chunk), tile, Z.BT)
    row, r = chunk_head * Z.C + tile * Z.BT, tl.arange(0, Z.BT)
    keep = (tl.arange(0, Z.BM) < Z.M)[None, :]
    Q = load_tokens(query, token, n, head, heads, Z.D, Z.BD, Z.BT)
    dY = load_tokens(dy, token, n, head, heads, Z.V, Z.BV, Z.BT)
    logs, _ = load_gates(key.log_decay, key.step, row, n, Z.BT)
    value_logs, _ = load_gates(value.log_decay, value.step, row, n, Z.BT)
    mu, value_mu = tl.exp(logs)[:, None], tl.exp(value_logs)[:, None]
    w, b = _affine(weight, head, 1.0, Z), _affine(bias, head, -0.0, Z)

    y_hat = _first_pass(Q, logs, n, key, alpha, t, tile, chunk_head, documents, heads, Z)
    P = apply_readout(y_hat, w, b, keep, Z.M * 1.0, Z.readout)
    store_slots(out.p, P, row * Z.M, n, 0, Z.M, Z)
    if Z.TILES == 1:
        dR = dot(P * value_mu, dY, Z.precision, TA=True)
        store_memory(out.value_start, dR, chunk_head, 0, None, Z.V, Z.BV, Z)
    dP = tl.full((Z.BT, Z.BM), 0.0, tl.float32)
    rows = tl.full((Z.BT,), 0.0, tl.float32)
    for other in range(0, tile + 1):
        X, W, logs_j, gamma = load_writes(value, alpha, t, other, chunk_head, documents, heads, Z.V, Z.BV, Z)
        dscores = dot(dY, X, Z.precision, TB=True) * _decay(value_logs, logs_j, tile, other, n, Z)
        dP -= dot(dscores * gamma, W, Z.precision)
        if Z.TILES == 1:
            dW = -dot(dscores, P, Z.precision, TA=True)
            store_slots(out.value_write, dW, row * Z.M, n, 0, Z.M, Z)
        pairs = dscores * dot(P, W, Z.precision, TB=True)
        rows -= tl.sum(pairs * gamma, 1)
        if Z.TILES == 1:
            tl.store(out.value_step + row + r, -tl.sum(pairs, 0), mask=r < n)
    R = load_memory(value.start, chunk_head, 0, None, Z.V, Z.BV, Z)
    state = dot(dY, R, Z.precision, TB=True) * value_mu
    rows += tl.sum(rounded(P, Z.precision) * state, 1)
    dP += state
    tl.store(out.value_rows + row + r, rows, mask=r < n)
    dY_hat, affine, normal = readout_backward(y_hat, w, b, dP, keep & (r < n)[:, None], Z.M * 1.0, Z.readout)
    _store_affine(out, affine, normal, chunk, head, heads, tile, Z)
    store_slots(out.y_hat, dY_hat, row * Z.M, n, 0, Z.M, Z)

    tl.debug_barrier()  # what was stored comes back, and so does Q: registers are short
    dY_hat = load_slots(out.y_hat, row * Z.M, n, 0, Z.M, Z)
    Q = load_tokens(query, token, n, head, heads, Z.D, Z.BD, Z.BT)
    logs, _ = load_gates(key.log_decay, key.step, row, n, Z.BT)
    mu = tl.exp(logs)[:, None]
    if Z.TILES == 1:
        dS = dot(dY_hat * mu, Q, Z.precision, TA=True)
        store_memory(out.key_start, dS, chunk_head, 0, None, Z.D, Z.BD, Z)
    dQ = tl.full((Z.BT, Z.BD), 0.0, tl.float32)
    rows = tl.full((Z.BT,), 0.0, tl.float32)
    for other in range(0, tile + 1):
        K, U, logs_j, gamma = load_writes(key, alpha, t, other, chunk_head, documents, heads, Z.D, Z.BD, Z)
        dscores = dot(dY_hat, U, Z.precision, TB=True) * _decay(logs, logs_j, tile, other, n, Z)
        dQ -= dot(dscores * gamma, K, Z.precision)
        scores = dot(Q, K, Z.precision, TB=True)
        pairs = dscores * scores
        rows -= tl.sum(pairs * gamma, 1)
        if Z.TILES == 1:
            tl.store(out.key_step + row + r, -tl.sum(pairs, 0), mask=r < n)
            scores = scores * _decay(logs, logs_j, tile, other, n, Z)
            dU = -dot(scores, dY_hat, Z.precision, TA=True)
            store_slots(out.key_write, dU, row * Z.M, n, 0, Z.M, Z)
    S = load_memory(key.start, chunk_head, 0, None, Z.D, Z.BD, Z)
    state = dot(dY_hat, S, Z.precision) * mu
    rows += tl.sum(Q.to(tl.float32) * state, 1)
    dQ += state
    tl.store(out.key_rows + row + r, rows, mask=r < n)
    store_tokens(out.query, dQ, token, n, head, heads, Z.D, Z.BD, Z.BT)


@triton.jit
def _store_affine(out, affine, normal, chunk, head, heads, tile, Z: tl.constexpr):
    """This program's part of dweight and dbias."""
    s = tl.arange(0, Z.BM)
    chunks = tl.num_programs(0) // heads
    part = ((head * chunks + chunk) * Z.TILES + tile) * Z.M + s
    if out.weight is not None:
        tl.store(out.weight + part, tl.sum(affine * normal, 0), mask=s < Z.M)
    if out.bias is not None:
        tl.store(out.bias + part, tl.sum(affine, 0), mask=s < Z.M)


@triton.jit
def _key_start(m, left, right, start, t, heads, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    """dS = (mu G)^T L of a chunk."""
    chunk_head = tl.program_id(0).to(tl.int64)
    head, chunk = chunk_head % heads, chunk_head // heads
    token, length = tl.load(t.token + chunk), tl.load(t.length + chunk)
    dS = tl.full((Z.BM, BF), 0.0, tl.float32)
    for other in range(0, Z.TILES):
        n, row = tile_length(length, other, Z.BT), chunk_head * Z.C + other * Z.BT
        L = load_tokens(left, token + other * Z.BT, n, head, heads, F, BF, Z.BT)
        G = load_slots(right, row * Z.M, n, 0, Z.M, Z)
        logs, _ = load_gates(m.log_decay, m.step, row, n, Z.BT)
        dS += dot(G * tl.exp(logs)[:, None], L, Z.precision, TA=True)
    store_memory(start, dS, chunk_head, 0, None, F, BF, Z)


@triton.jit
def _key_tile(
    m,
    left,
    right,
    write,
    step,
    alpha,
    t,
    documents,
    heads,
    F: tl.constexpr,
    BF: tl.constexpr,
    Z: tl.constexpr,
):
    """dU' = -((L X^T) o Omega)^T G and U.dU' of a key tile."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, chunk = chunk_head % heads, chunk_head // heads
    token, length = tl.load(t.token + chunk), tl.load(t.length + chunk)
    X, U, logs, _gamma = load_writes(m, alpha, t, tile, chunk_head, documents, heads, F, BF, Z)
    dU = tl.full((Z.BT, Z.BM), 0.0, tl.float32)
    dgamma = tl.full((Z.BT,), 0.0, tl.float32)
    for other in range(tile, Z.TILES):
        n, row = tile_length(length, other, Z.BT), chunk_head * Z.C + other * Z.BT
        L = load_tokens(left, token + other * Z.BT, n, head, heads, F, BF, Z.BT)
        G = load_slots(right, row * Z.M, n, 0, Z.M, Z)
        logs_i, _ = load_gates(m.log_decay, m.step, row, n, Z.BT)
        scores = dot(L, X, Z.precision, TB=True) * _decay(logs_i, logs, other, tile, n, Z)
        dgamma -= tl.sum(scores * dot(G, U, Z.precision, TB=True), 0)
        dU -= dot(scores, G, Z.precision, TA=True)
    n, row = tile_length(length, tile, Z.BT), chunk_head * Z.C + tile * Z.BT
    store_slots(write, dU, row * Z.M, n, 0, Z.M, Z)
    r = tl.arange(0, Z.BT)
    tl.store(step + row + r, dgamma, mask=r < n)


@triton.jit
def key_backward_kernel(query, key, value, dy, alpha, out, t, documents, heads, Z: tl.constexpr):
    """Grid (P * H, TILES + 1, 2), for chunks of several tiles: the key tiles' part of ``out``.

    The memories' gradients are the chunk's last program's.
    """
    o, memory = out, tl.program_id(1) == Z.TILES
    if tl.program_id(2) == 0:
        if memory:
            _key_start(key, query, o.y_hat, o.key_start, t, heads, Z.D, Z.BD, Z)
        else:
            _key_tile(key, query, o.y_hat, o.key_write, o.key_step, alpha, t, documents, heads, Z.D, Z.BD, Z)
    else:
        if memory:
            _key_start(value, dy, o.p, o.value_start, t, heads, Z.V, Z.BV, Z)
        else:
            _key_tile(value, dy, o.p, o.value_write, o.value_step, alpha, t, documents, heads, Z.V, Z.BV, Z)
