# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of keys, values, latent targets and gates, after the reverse scan.

Parallel over chunks, heads and tiles of BT tokens; one program does both passes, so that nothing is added up
outside. Shapes as in ``kernels.stages``; X is K (L = Q, G = dYhat) or V (L = dY, G = P), dS+ the adjoint of
the memory after the chunk. The pre-activations and their gradients are recomputed:

    dW   = dU'_readout - (tail X) dS+^T        dB = gamma dW, corrected: from the reverse scan
    (dZ, dA) = inner_backward(Z, A, dB)        corrected: dZ = mu dZ
    dX   = -((G U'^T) o Omega)^T L + End + Zr + Xq + Xk
    End  = -(tail U') dS+;   Zr = dZ S'
    corrected, with B = (dB U'^T) o Omega below the diagonal and T = (X X^T) o Omega below the diagonal:
           Xq = -B X + mu dB (S - S');   Xk = -B^T X;   otherwise Xq = Xk = 0
    gates  dgamma = U.dU'_readout - U.(tail X dS+^T) - (corrected) U.(T^T dB)
           dl = Q.dQ (or P.dP) + (corrected) X.Xq + Z.dZ, completed in gate_gradients
           at the chunk's end: sum_j X_j.End_j + e^{l_C} <S, dS+>

U.(T^T dB) and X.Xq are column and row sums of one matrix of pairs, for the reason in ``readout``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.triton.activations import inner_backward, inner_gradient
from kernels.triton.readout import load_stale, load_writes
from kernels.triton.tiles import (
    dot,
    load_gates,
    load_memory,
    load_slots,
    load_tokens,
    omega,
    store_tokens,
    tile_length,
)

__all__ = ["Side", "inputs_kernel"]


class Side(NamedTuple):
    """What one pass reads and writes here.

    Attributes:
        left, right: L [B * T, H, F] and G [P, H, C, M].
        write: the readout's dU' [P, H, C, M].
        base: dB [P, H, C, M], corrected only.
        end: dS+ [P, H, M, F].
        dx: gradient of x, token order.
        rows, dgamma: the readout's dl and dgamma [P, H, C], to be completed in place.
        parts: each tile's part of the chunk's end [TILES, P, H].
    """

    left: Any
    right: Any
    write: Any
    base: Any
    end: Any
    dx: Any
    rows: Any
    dgamma: Any
    parts: Any


@triton.jit
def _from_queries(m, s, dX, U, logs, gamma, t, tile, chunk_head, heads, F, BF, Z: tl.constexpr):
    """dX less ((G U'^T) o Omega)^T L, summed over the tiles from this one on."""
    head, chunk, r = chunk_head % heads, chunk_head // heads, tl.arange(0, Z.BT)
    token, length = tl.load(t.token + chunk), tl.load(t.length + chunk)
    for other in range(tile, Z.TILES):
        n, row = tile_length(length, other, Z.BT), chunk_head * Z.C + other * Z.BT
        L = load_tokens(s.left, token + other * Z.BT, n, head, heads, F, BF, Z.BT)
        G = load_slots(s.right, row * Z.M, n, 0, Z.M, Z)
        logs_i, _ = load_gates(m.log_decay, m.step, row, n, Z.BT)
        decay = omega(logs_i, logs, other * Z.BT + r, tile * Z.BT + r, r < n)
        scores = dot(G, U, Z.precision, TB=True) * (decay * gamma[None, :])
        dX -= dot(scores, L, Z.precision, TA=True)
    return dX


@triton.jit
def _from_keys(m, s, dX, X, U, logs, gamma, t, tile, chunk_head, heads, F, BF, Z: tl.constexpr):
    """(dX + Xk, -U.(T^T dB)) of ``corrected``: what the chunk's later tokens read of the tile's writes."""
    head, chunk, r = chunk_head % heads, chunk_head // heads, tl.arange(0, Z.BT)
    token, length = tl.load(t.token + chunk), tl.load(t.length + chunk)
    dgamma = tl.full((Z.BT,), 0.0, tl.float32)
    for other in range(tile, Z.TILES):
        n, row = tile_length(length, other, Z.BT), chunk_head * Z.C + other * Z.BT
        dB = load_slots(s.base, row * Z.M, n, 0, Z.M, Z)
        X_i = load_tokens(m.x, token + other * Z.BT, n, head, heads, F, BF, Z.BT)
        logs_i, _ = load_gates(m.log_decay, m.step, row, n, Z.BT)
        decay = omega(logs_i, logs, other * Z.BT + r, tile * Z.BT + r, r < n, True)
        scores = dot(dB, U, Z.precision, TB=True) * decay
        dX -= dot(scores * gamma[None, :], X_i, Z.precision, TA=True)
        dgamma -= tl.sum(scores * dot(X_i, X, Z.precision, TB=True), 0)
    return dX, dgamma


@triton.jit
def _as_reader(
    m, dX, rows, X, dB, logs, n, alpha, t, tile, chunk_head, documents, heads, F, BF, Z: tl.constexpr
):
    """dX + Xq and rows + X.Xq of ``corrected``, through what B reads of the chunk's earlier writes."""
    r = tl.arange(0, Z.BT)
    for other in range(0, tile + 1):
        X_j, U, logs_j, gamma = load_writes(m, alpha, t, other, chunk_head, documents, heads, F, BF, Z)
        decay = omega(logs, logs_j, tile * Z.BT + r, other * Z.BT + r, r < n, True)
        scores = dot(dB, U, Z.precision, TB=True) * decay * gamma
        dX -= dot(scores, X_j, Z.precision)
        rows -= tl.sum(scores * dot(X, X_j, Z.precision, TB=True), 1)
    return dX, rows


@triton.jit
def _one(m, s, alpha, t, tile, chunk_head, documents, chunks, heads, F, BF, Z: tl.constexpr):
    """dalpha [BT, BM] of one pass; everything else is stored, as soon as may be: registers are short."""
    head, chunk, r = chunk_head % heads, chunk_head // heads, tl.arange(0, Z.BT)
    token, n = tl.load(t.token + chunk) + tile * Z.BT, tile_length(tl.load(t.length + chunk), tile, Z.BT)
    row = chunk_head * Z.C + tile * Z.BT
    real = (tl.arange(0, Z.BM) < Z.M)[None, :] & (r < n)[:, None]
    X = load_tokens(m.x, token, n, head, heads, F, BF, Z.BT)
    at = load_stale(m, chunk_head, documents, heads, F, BF, Z)
    after = load_memory(s.end, chunk_head, 0, None, F, BF, Z)
    A = load_slots(alpha, (token * heads + head) * Z.M, n, 0, heads * Z.M, Z).to(tl.float32)
    logs, gamma = load_gates(m.log_decay, m.step, row, n, Z.BT)
    end = tl.load(m.log_decay + chunk_head * Z.C + Z.C - 1)
    tail = tl.exp(tl.where(r < n, end - logs, 0.0))[:, None]
    start = load_memory(m.start, chunk_head, 0, None, F, BF, Z).to(tl.float32)
    part = tl.exp(end) * tl.sum(tl.sum(start * after.to(tl.float32), 1), 0)
    part = tl.where(tile == 0, part, 0.0)

    pre = dot(X, at, Z.precision, TB=True)
    seen = dot(X, after, Z.precision, TB=True) * tail
    if Z.corrected:
        pre = pre * tl.exp(logs)[:, None]
        dB = load_slots(s.base, row * Z.M, n, 0, Z.M, Z).to(tl.float32)
        U = load_slots(m.gradient, row * Z.M, n, 0, Z.M, Z).to(tl.float32)
    else:
        dB = (load_slots(s.write, row * Z.M, n, 0, Z.M, Z).to(tl.float32) - seen) * gamma[:, None]
        U = inner_gradient(pre, A, real, Z.M * 1.0, Z.phi, 1)
    dgamma = tl.load(s.dgamma + row + r, mask=r < n, other=0.0) - tl.sum(U * seen, 1)
    part -= tl.sum(tl.sum(U * gamma[:, None] * seen, 1), 0)  # X_j . End_j
    tl.store(s.parts + tile * chunks * heads + chunk_head, part)
    dZ, dA = inner_backward(pre, A, dB, real, Z.M * 1.0, Z.phi, 1)
    if Z.corrected:
        rows = tl.load(s.rows + row + r, mask=r < n, other=0.0) + tl.sum(pre * dZ, 1)  # Z.dZ is X.Zr
        dZ = dZ * tl.exp(logs)[:, None]
    dX = dot(dZ, at, Z.precision)
    dX -= dot(U * (gamma[:, None] * tail), after, Z.precision)
    if Z.corrected:
        if m.pair is not None:
            carried = dot(dB * tl.exp(logs)[:, None], start - at, Z.precision)
            rows += tl.sum(X.to(tl.float32) * carried, 1)
            dX += carried
        dX, dstep = _from_keys(m, s, dX, X, U, logs, gamma, t, tile, chunk_head, heads, F, BF, Z)
        dgamma += dstep
        dX, rows = _as_reader(
            m, dX, rows, X, dB, logs, n, alpha, t, tile, chunk_head, documents, heads, F, BF, Z
        )
        tl.store(s.rows + row + r, rows, mask=r < n)
    tl.store(s.dgamma + row + r, dgamma, mask=r < n)
    dX = _from_queries(m, s, dX, U, logs, gamma, t, tile, chunk_head, heads, F, BF, Z)
    store_tokens(s.dx, dX, token, n, head, heads, F, BF, Z.BT)
    return dA


@triton.jit
def inputs_kernel(
    key, key_side, value, value_side, alpha, dalpha, t, documents, chunks, heads, Z: tl.constexpr
):
    """Grid (P * H, TILES); ``chunks`` is P."""
    chunk_head, tile = tl.program_id(0).to(tl.int64), 0
    if Z.TILES > 1:
        tile = tl.program_id(1)
    dA = _one(key, key_side, alpha, t, tile, chunk_head, documents, chunks, heads, Z.D, Z.BD, Z)
    dA += _one(value, value_side, alpha, t, tile, chunk_head, documents, chunks, heads, Z.V, Z.BV, Z)
    head, chunk = chunk_head % heads, chunk_head // heads
    token, n = tl.load(t.token + chunk) + tile * Z.BT, tile_length(tl.load(t.length + chunk), tile, Z.BT)
    store_tokens(dalpha, dA, token, n, head, heads, Z.M, Z.BM, Z.BT)
