# mypy: allow-untyped-defs, allow-incomplete-defs
"""The two scans: memories forward, adjoints backward, sequential over the chunks of a run.

Shapes as in ``kernels.stages``. One program carries one block of BM slots of one memory (key or value) of one
head over one run of chunks: a whole document, or in the rescan a segment of it. Both memories share a launch.
With elementwise phi the slots are independent, so the grid is (runs * H, 2, ceil(M / BM)); the row-wise phi
need BM >= M. X is K or V:

    forward    stale       Z = X S'^T;           U = J_phi(Z)^T (phi(Z) - A)
               corrected   Z = mu X S'^T;        B = J_phi(Z)^T (phi(Z) - A) + mu X (S - S')^T
                           U = L^-1 B,  L = I + strictlower((X X^T) o Omega) diag(gamma)
               S+ = e^{l_C} S - (gamma tail U)^T X
    backward   dW  = dU'_readout - (tail X) dS+^T
               dB  = gamma dW;  corrected: L^-T (gamma dW)
               (dZ, dA) = inner_backward(Z, A, dB);  corrected: dZ = mu dZ
               dS' = dZ^T X;    dS = e^{l_C} dS+ + dS_readout  (+ dS' where S' is S)
               with a pair, corrected: dS += (mu dB)^T X, dS' -= (mu dB)^T X

A chunk is walked in tiles of BT tokens: inside it every token sees the same stale memory. L is solved by
block substitution: the inverses of its diagonal tiles are given, earlier tiles' U (later ones' dB) come back
from scratch. Tiles are held slots first, [BM, BT], so that the memory and U feed the next product from
registers: the chain from chunk to chunk is two products, and one more for ``corrected``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.triton.activations import inner_backward, inner_gradient
from kernels.triton.tiles import (
    chunk_of,
    dot,
    load_gates,
    load_memory,
    load_slots,
    load_tokens,
    omega,
    store_memory,
    store_slots,
    tile_length,
)

__all__ = ["Backward", "Forward", "scan_backward_kernel", "scan_forward_kernel"]


class Forward(NamedTuple):
    """One pass of the forward scan; F is D or V. None: not wanted, or not there.

    Attributes:
        x, log_decay, step: as in ``tiles.Pass``.
        inverse: L^-1 of every tile [P, H, TILES, BT, BT].
        initial: memories before each run [G, H, M, F].
        pair: stale memories of the documents' first chunks [N, H, M, F].
        saved: memories every so many chunks of a document [., H, M, F].
        start: memories before every chunk [P, H, M, F].
        final, last: memories after each run, and the chunk-start memory the next call takes [G, H, M, F].
        gradient: U [P, H, C, M].
    """

    x: Any
    log_decay: Any
    step: Any
    inverse: Any
    initial: Any
    pair: Any
    saved: Any
    start: Any
    final: Any
    last: Any
    gradient: Any


class Backward(NamedTuple):
    """One pass of the reverse scan over whole documents.

    Attributes:
        x, log_decay, step, start, pair, inverse: as above.
        write: the readout's dU' [P, H, C, M].
        readout: the readout's dS [P, H, M, F].
        final, outside: adjoint of the final memories, and of ``last`` where it is not the final one [N, ...].
        initial, initial_pair: adjoints of the initial memories and of the pair [N, H, M, F].
        end: adjoint of the memory after every chunk [P, H, M, F].
        base: dB [P, H, C, M], corrected only.
        decay: what ``outside`` adds to dl at a document's end [ceil(M / BM), P, H], corrected only.
    """

    x: Any
    log_decay: Any
    step: Any
    inverse: Any
    start: Any
    pair: Any
    write: Any
    readout: Any
    final: Any
    outside: Any
    initial: Any
    initial_pair: Any
    end: Any
    base: Any
    decay: Any


@triton.jit
def _document(t, rank):
    """(first token, tokens of the first chunk and of the last one, chunks) of a document."""
    chunks = tl.load(t.counts + rank)
    last = tl.load(t.base + chunks - 1) + rank
    return tl.load(t.token + rank), tl.load(t.length + rank), tl.load(t.length + last), chunks


@triton.jit
def _chunk_tokens(document, i, C: tl.constexpr):
    """(first token, number of tokens) of chunk i: arithmetic, so that loads need not wait for tables."""
    token, first, last, chunks = document
    length = tl.where(i == chunks - 1, last, tl.where(i == 0, first, C))
    return token + tl.where(i == 0, 0, first + (i - 1) * C), length


@triton.jit
def _load_inverse(m, chunk_head, tile, Z: tl.constexpr):
    r = tl.arange(0, Z.BT)
    base = (chunk_head * Z.TILES + tile) * (Z.BT * Z.BT)
    return tl.load(m.inverse + base + r[:, None] * Z.BT + r[None, :])


@triton.jit
def _stale(m, S, i, rank, head, heads, slot, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    """S' of chunk i: the memory itself, in a document's first chunk the carried one."""
    if m.pair is not None:
        S = tl.where(i == 0, load_memory(m.pair, rank * heads + head, slot, i == 0, F, BF, Z), S)
    return S


@triton.jit
def _earlier_tiles(m, X, logs, tile, token, length, chunk_head, head, heads, slot, F, BF, Z: tl.constexpr):
    """(sum over tiles s < t of T_ts U'_s)^T [BM, BT]."""
    r = tl.arange(0, Z.BT)
    total = tl.full((Z.BM, Z.BT), 0.0, tl.float32)
    for s in range(0, tile):
        n = tile_length(length, s, Z.BT)
        row = chunk_head * Z.C + s * Z.BT
        X_s = load_tokens(m.x, token + s * Z.BT, n, head, heads, F, BF, Z.BT)
        logs_s, gamma = load_gates(m.log_decay, m.step, row, n, Z.BT)
        U = load_slots(m.gradient, row * Z.M, n, slot, Z.M, Z, True)
        decay = omega(logs, logs_s, r + Z.BT, r, r < tile_length(length, tile, Z.BT))
        overlap = dot(X, X_s, Z.precision, TB=True) * (decay * gamma[None, :])
        total += dot(U, overlap, Z.precision, TB=True)
    return total


@triton.jit
def _forward_one(m, alpha, t, heads, documents, every, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    run, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    slot = tl.program_id(2) * Z.BM
    keep, r = (slot + tl.arange(0, Z.BM) < Z.M)[:, None], tl.arange(0, Z.BT)
    rank, first = tl.load(t.rank + run), tl.load(t.first + run).to(tl.int32)
    count = tl.load(t.count + run).to(tl.int32)
    document = _document(t, rank)
    inside = tl.full((), False, tl.int1)
    if t.ends_inside is not None:
        inside = tl.load(t.ends_inside + rank) != 0
    segment = rank
    S = load_memory(m.initial, run * heads + head, slot, None, F, BF, Z)
    for i in range(first, first + count):
        chunk = chunk_of(t, i, rank, documents, Z.even)
        chunk_head = chunk * heads + head
        token, length = _chunk_tokens(document, i, Z.C)
        end = tl.load(m.log_decay + chunk_head * Z.C + Z.C - 1)
        total = tl.exp(end)
        store_memory(m.start, S, chunk_head, slot, None, F, BF, Z)
        if m.saved is not None:
            save = i % every == 0
            store_memory(m.saved, S, segment * heads + head, slot, save, F, BF, Z)
            active = chunk_of(t, i + 1, rank, documents, Z.even) - chunk
            segment += tl.where(save, active, 0)
        at = _stale(m, S, i, rank, head, heads, slot, F, BF, Z)
        if m.last is not None:
            leaving = at
            if Z.corrected:
                leaving = at * total
            store_memory(m.last, leaving, run * heads + head, slot, inside & (i == count - 1), F, BF, Z)
        next_S = S * total
        for tile in range(0, Z.TILES):
            n = tile_length(length, tile, Z.BT)
            row, first_row = chunk_head * Z.C + tile * Z.BT, token + tile * Z.BT
            X = load_tokens(m.x, first_row, n, head, heads, F, BF, Z.BT)
            A = load_slots(alpha, (first_row * heads + head) * Z.M, n, slot, heads * Z.M, Z, True)
            logs, gamma = load_gates(m.log_decay, m.step, row, n, Z.BT)
            weight = gamma * tl.exp(tl.where(r < n, end - logs, 0.0))
            real = keep & (r < n)[None, :]
            pre = dot(at, X, Z.precision, TB=True)
            if Z.corrected:
                pre = pre * tl.exp(logs)[None, :]
            U = inner_gradient(pre, A.to(tl.float32), real, Z.M * 1.0, Z.phi, 0)
            if Z.corrected:
                if m.pair is not None:
                    U += dot(S - at, X, Z.precision, TB=True) * tl.exp(logs)[None, :]
                if Z.TILES > 1:
                    U -= _earlier_tiles(
                        m, X, logs, tile, token, length, chunk_head, head, heads, slot, F, BF, Z
                    )
                U = dot(U, _load_inverse(m, chunk_head, tile, Z), Z.precision, TB=True)
            if m.gradient is not None:
                store_slots(m.gradient, U, row * Z.M, n, slot, Z.M, Z, True)
                if Z.corrected and Z.TILES > 1:
                    tl.debug_barrier()  # later tiles read U back in another layout
            next_S -= dot(U * weight[None, :], X, Z.precision)
        S = next_S
    if m.final is not None:
        store_memory(m.final, S, run * heads + head, slot, None, F, BF, Z)
        store_memory(m.last, S, run * heads + head, slot, inside == 0, F, BF, Z)


@triton.jit
def scan_forward_kernel(key, value, alpha, t, heads, documents, every, Z: tl.constexpr):
    """Grid (runs * H, 2, ceil(M / BM)); ``every``: chunks from one saved memory to the next."""
    if tl.program_id(1) == 0:
        _forward_one(key, alpha, t, heads, documents, every, Z.D, Z.BD, Z)
    else:
        _forward_one(value, alpha, t, heads, documents, every, Z.V, Z.BV, Z)


@triton.jit
def _later_tiles(m, X, logs, tile, token, length, chunk_head, head, heads, slot, F, BF, Z: tl.constexpr):
    """(sum over tiles s > t of T_st^T dB_s)^T [BM, BT]."""
    r = tl.arange(0, Z.BT)
    total = tl.full((Z.BM, Z.BT), 0.0, tl.float32)
    for s in range(tile + 1, Z.TILES):
        n = tile_length(length, s, Z.BT)
        row = chunk_head * Z.C + s * Z.BT
        X_s = load_tokens(m.x, token + s * Z.BT, n, head, heads, F, BF, Z.BT)
        logs_s, _ = load_gates(m.log_decay, m.step, row, n, Z.BT)
        dB = load_slots(m.base, row * Z.M, n, slot, Z.M, Z, True)
        decay = omega(logs_s, logs, r + Z.BT, r, r < n)
        total += dot(dB, dot(X_s, X, Z.precision, TB=True) * decay, Z.precision)
    return total


@triton.jit
def _outside(m, at, total, ends, document, chunk_head, stride, slot, F, BF, Z: tl.constexpr):
    """What a chunk-start memory handed out by the last chunk adds to dS' [BM, BF]."""
    outside = load_memory(m.outside, document, slot, ends, F, BF, Z)
    if Z.corrected:  # it was handed out decayed
        outside = outside * total
        part = tl.sum(tl.sum(outside * at, 1), 0)
        tl.store(m.decay + tl.program_id(2) * stride + chunk_head, part, mask=ends)
    return outside


@triton.jit
def _backward_one(m, alpha, t, heads, documents, chunks, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    rank, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    slot = tl.program_id(2) * Z.BM
    keep, r = (slot + tl.arange(0, Z.BM) < Z.M)[:, None], tl.arange(0, Z.BT)
    document = _document(t, rank)
    count = tl.load(t.counts + rank).to(tl.int32)
    dS = tl.full((Z.BM, BF), 0.0, tl.float32)
    if m.final is not None:
        dS = load_memory(m.final, rank * heads + head, slot, None, F, BF, Z)
    for back in range(0, count):
        i = count - 1 - back
        chunk_head = chunk_of(t, i, rank, documents, Z.even) * heads + head
        token, length = _chunk_tokens(document, i, Z.C)
        at = load_memory(m.start, chunk_head, slot, None, F, BF, Z).to(tl.float32)
        at = _stale(m, at, i, rank, head, heads, slot, F, BF, Z)
        read = load_memory(m.readout, chunk_head, slot, None, F, BF, Z)
        end = tl.load(m.log_decay + chunk_head * Z.C + Z.C - 1)
        store_memory(m.end, dS, chunk_head, slot, None, F, BF, Z)
        direct = dS * tl.exp(end) + read
        through = tl.full((Z.BM, BF), 0.0, tl.float32)  # dS'
        if m.outside is not None:
            last = i == count - 1
            memory = rank * heads + head
            through = _outside(m, at, tl.exp(end), last, memory, chunk_head, chunks * heads, slot, F, BF, Z)
        for turn in range(0, Z.TILES):
            tile = Z.TILES - 1 - turn
            n = tile_length(length, tile, Z.BT)
            row, first_row = chunk_head * Z.C + tile * Z.BT, token + tile * Z.BT
            X = load_tokens(m.x, first_row, n, head, heads, F, BF, Z.BT)
            A = load_slots(alpha, (first_row * heads + head) * Z.M, n, slot, heads * Z.M, Z, True)
            dB = load_slots(m.write, row * Z.M, n, slot, Z.M, Z, True).to(tl.float32)
            logs, gamma = load_gates(m.log_decay, m.step, row, n, Z.BT)
            mu, tail = tl.exp(logs)[None, :], tl.exp(tl.where(r < n, end - logs, 0.0))[None, :]
            pre = dot(at, X, Z.precision, TB=True)
            dB = (dB - dot(dS, X, Z.precision, TB=True) * tail) * gamma[None, :]
            if Z.corrected:
                pre = pre * mu
                if Z.TILES > 1:
                    later = _later_tiles(
                        m, X, logs, tile, token, length, chunk_head, head, heads, slot, F, BF, Z
                    )
                    dB -= later * gamma[None, :]
                dB = dot(dB, _load_inverse(m, chunk_head, tile, Z), Z.precision)
                store_slots(m.base, dB, row * Z.M, n, slot, Z.M, Z, True)
                if Z.TILES > 1:
                    tl.debug_barrier()  # earlier tiles read dB back in another layout
            dZ, _ = inner_backward(pre, A.to(tl.float32), dB, keep & (r < n)[None, :], Z.M * 1.0, Z.phi, 0)
            if Z.corrected:
                dZ = dZ * mu
                if m.pair is not None:
                    carried = dot(tl.where(i == 0, dB * mu, 0.0), X, Z.precision)
                    direct += carried
                    through -= carried
            through += dot(dZ, X, Z.precision)
        if m.pair is not None:
            store_memory(m.initial_pair, through, rank * heads + head, slot, i == 0, F, BF, Z)
            through = tl.where(i == 0, 0.0, through)
        dS = direct + through
    store_memory(m.initial, dS, rank * heads + head, slot, None, F, BF, Z)


@triton.jit
def scan_backward_kernel(key, value, alpha, t, heads, documents, chunks, Z: tl.constexpr):
    """Grid (N * H, 2, ceil(M / BM)); ``chunks`` is P."""
    if tl.program_id(1) == 0:
        _backward_one(key, alpha, t, heads, documents, chunks, Z.D, Z.BD, Z)
    else:
        _backward_one(value, alpha, t, heads, documents, chunks, Z.V, Z.BV, Z)
