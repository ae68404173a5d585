# mypy: allow-untyped-defs, allow-incomplete-defs
"""Arguments, addresses, loads and products shared by the kernels.

Big operands stay in token order [B * T, H, F]; a chunk's tokens lie together there, so a tile of BT of them
is its first token and the number n of tokens it holds. Gates and scratch are in chunk order [P, H, C, .];
rows without a token are neither written nor read. Token, chunk and memory numbers are int64 where they meet a
stride; offsets inside a tile are int32.

A product multiplies in PRECISION and accumulates in fp32. Memories and every sum stay fp32:

    "bf16"   bf16 operands: both factors are rounded to bf16. Scratch that is only a factor (chunk-start
             memories, their adjoints, U', P, dYhat) is stored in bf16, which rounds nothing twice
    "tf32"   fp16 operands (bf16 would drop 3 of their bits, fp16 would overflow in the gradients)
    "ieee"   fp32 operands
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Pass", "Sizes", "Tables", "chunk_of", "dot", "load_gates", "load_memory", "load_slots"]
__all__ += ["load_tokens", "omega", "rounded", "store_memory", "store_slots", "store_tokens", "tile_length"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Sizes(NamedTuple):
    """What a kernel is compiled for; strings are wrapped, or Triton 3.6 cannot hand them on.

    Attributes:
        D, V, M, C: widths of keys and values, slots, tokens of a chunk.
        BD, BV, BM, BT: those of tiles, powers of two; BM covers M except in the scans.
        TILES: ceil(C / BT).
        phi, readout: activations.
        corrected: the update.
        even: whether all documents have the same number of chunks.
        precision: of products.
    """

    D: int
    V: int
    M: int
    C: int
    BD: int
    BV: int
    BM: int
    BT: int
    TILES: int
    phi: tl.constexpr
    readout: tl.constexpr
    corrected: bool
    even: bool
    precision: tl.constexpr


class Pass(NamedTuple):
    """One of the two passes, as the kernels that are parallel over chunks see it; F is D or V.

    Attributes:
        x: keys or values [B * T, H, F].
        log_decay, step: l and gamma [P, H, C].
        start: memories before every chunk [P, H, M, F].
        pair: stale memories of the first chunks [N, H, M, F] (chunk n is the first of rank n), or None.
        gradient: inner gradients U [P, H, C, M], or None where they are recomputed.
    """

    x: Any
    log_decay: Any
    step: Any
    start: Any
    pair: Any
    gradient: Any


class Tables(NamedTuple):
    """Chunks of a layout and the runs of chunks that a scan walks, int64.

    Attributes:
        rank, first, count: document of each run, its first scan step and its number of chunks [G].
        base: first chunk of each scan step.
        counts: chunks of each document, by rank [N].
        token, length: first token of each chunk and number of its tokens [P].
        ends_inside: whether each document, by rank, ends inside a chunk [N]; None when none does.
    """

    rank: Any
    first: Any
    count: Any
    base: Any
    counts: Any
    token: Any
    length: Any
    ends_inside: Any


@triton.jit
def _rounded(x):
    """fp32 at bf16 precision, to nearest even: the interpreter truncates, and its bf16 products are wrong."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _store(pointers, value, mask):
    if INTERPRETED:  # noqa: SIM102 - branches are taken at compile time
        if pointers.dtype.element_ty == tl.bfloat16:
            value = _rounded(value)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    if PRECISION != "bf16":
        x = x.to(tl.float32)
    elif INTERPRETED:
        x = _rounded(x)
    else:
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x in fp32, with the values that a product takes it at."""
    return _factor(x, PRECISION).to(tl.float32)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, TA: tl.constexpr = False, TB: tl.constexpr = False):
    """a @ b in fp32; TA, TB: of the transposed factor.

    A factor is rounded before it is transposed: only then is the transposition a view of shared memory.
    """
    a, b = _factor(a, PRECISION), _factor(b, PRECISION)
    if TA:
        a = tl.trans(a)
    if TB:
        b = tl.trans(b)
    if PRECISION == "bf16":
        product = tl.dot(a, b)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def tile_length(length, tile, BT: tl.constexpr):
    """Tokens in tile ``tile`` of a chunk of ``length`` tokens, in [.., BT]."""
    return (length - tile * BT).to(tl.int32)


@triton.jit
def chunk_of(t, step, rank, documents, EVEN: tl.constexpr):
    """Chunk of the document ``rank`` at a scan step, int64."""
    if EVEN:
        chunk = step * documents + rank
    else:
        chunk = tl.load(t.base + step) + rank
    return chunk


@triton.jit
def _token_offsets(n, heads, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr):
    r, f = tl.arange(0, BT), tl.arange(0, BF)
    return r[:, None] * (heads * F) + f[None, :], (r < n)[:, None] & (f < F)[None, :]


@triton.jit
def load_tokens(x, token, n, head, heads, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr):
    """Rows ``token`` ... ``token + n`` of x [B * T, H, F] as [BT, BF] in x's type; zero outside."""
    offsets, mask = _token_offsets(n, heads, F, BF, BT)
    return tl.load(x + (token * heads + head) * F + offsets, mask=mask, other=0.0)


@triton.jit
def store_tokens(x, value, token, n, head, heads, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr):
    """Counterpart of ``load_tokens``."""
    offsets, mask = _token_offsets(n, heads, F, BF, BT)
    _store(x + (token * heads + head) * F + offsets, value, mask)


@triton.jit
def _slot_offsets(n, slot, stride, Z: tl.constexpr, SLOTS_FIRST: tl.constexpr):
    r, s = tl.arange(0, Z.BT), slot + tl.arange(0, Z.BM)
    if SLOTS_FIRST:
        offsets, mask = s[:, None] + r[None, :] * stride, (s < Z.M)[:, None] & (r < n)[None, :]
    else:
        offsets, mask = r[:, None] * stride + s[None, :], (r < n)[:, None] & (s < Z.M)[None, :]
    return offsets, mask


@triton.jit
def load_slots(x, row, n, slot, stride, Z: tl.constexpr, SLOTS_FIRST: tl.constexpr = False):
    """n rows from x + row, ``stride`` apart, of slots from ``slot``: [BT, BM] or [BM, BT]; zero outside."""
    offsets, mask = _slot_offsets(n, slot, stride, Z, SLOTS_FIRST)
    return tl.load(x + row + offsets, mask=mask, other=0.0)


@triton.jit
def store_slots(x, value, row, n, slot, stride, Z: tl.constexpr, SLOTS_FIRST: tl.constexpr = False):
    """Counterpart of ``load_slots``."""
    offsets, mask = _slot_offsets(n, slot, stride, Z, SLOTS_FIRST)
    _store(x + row + offsets, value, mask)


@triton.jit
def _memory_offsets(index, slot, when, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    s, f = slot + tl.arange(0, Z.BM), tl.arange(0, BF)
    slots = Z.M
    if when is not None:
        slots = tl.where(when, Z.M, 0)
    return index * (Z.M * F), s[:, None] * F + f[None, :], (s < slots)[:, None] & (f < F)[None, :]


@triton.jit
def load_memory(x, index, slot, when, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    """Slots from ``slot`` of memory ``index`` of x [., M, F] as [BM, BF]; zero outside and where
    ``when``, if given, is false."""
    base, offsets, mask = _memory_offsets(index, slot, when, F, BF, Z)
    return tl.load(x + base + offsets, mask=mask, other=0.0)


@triton.jit
def store_memory(x, value, index, slot, when, F: tl.constexpr, BF: tl.constexpr, Z: tl.constexpr):
    """Counterpart of ``load_memory``; stores nothing unless ``when``."""
    base, offsets, mask = _memory_offsets(index, slot, when, F, BF, Z)
    _store(x + base + offsets, value, mask)


@triton.jit
def load_gates(log_decay, step, row, n, BT: tl.constexpr):
    """(l, gamma) of n tokens from ``row`` of [P * H * C]; zero where there is no token."""
    r = tl.arange(0, BT)
    logs = tl.load(log_decay + row + r, mask=r < n, other=0.0)
    return logs, tl.load(step + row + r, mask=r < n, other=0.0)


@triton.jit
def omega(log_i, log_j, i, j, valid, STRICT: tl.constexpr = False):
    """e^{l_i - l_j} for j <= i (j < i if STRICT) in ``valid`` rows, else 0.

    The exponent is masked before exp, so nothing overflows into NaN.
    """
    if STRICT:
        keep = (i[:, None] > j[None, :]) & valid[:, None]
    else:
        keep = (i[:, None] >= j[None, :]) & valid[:, None]
    return tl.exp(tl.where(keep, log_i[:, None] - log_j[None, :], -float("inf")))
