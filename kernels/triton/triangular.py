# mypy: allow-untyped-defs, allow-incomplete-defs
"""Inverses of the unit lower triangular matrices of the corrected update, one for each tile of a chunk.

X [n, F] are a chunk's keys (or values), l its cumulative log decay, gamma its step sizes:

    L_ij = (x_i . x_j) e^{l_i - l_j} gamma_j  for i > j;   L_ii = 1;   L_ij = 0 for i < j

restricted to a tile of ``tokens`` tokens. A caller solves L U = B for the whole chunk by forward substitution
over its tiles: U_t = (L_tt)^{-1} (B_t - sum_{s < t} L_ts U_s).

Blocks of 16 are inverted by elimination, column by column; two neighbours then make one block of twice the
size:

    [A 0; C B]^{-1} = [A^{-1} 0; -B^{-1} C A^{-1} B^{-1}]

in fp32 throughout. Products such as (I - N)(I + N^2)(I + N^4)..., N = L - I, are shorter, but their terms
grow like binomials where keys repeat (N all ones) and cancel to nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import PackedLayout
from kernels.triton.launch import padded

__all__ = ["SIZES", "diagonal_inverses"]

SIZES = (16, 32, 64)  # a program cannot hold 128 rows in registers


def diagonal_inverses(
    x: tuple[Tensor, Tensor], log_decay: Tensor, step: Tensor, layout: PackedLayout, *, tokens: int
) -> Tensor:
    """Inverse of every diagonal tile of L, for both memories.

    Args:
        x: keys [B, T, H, D] and values [B, T, H, V] in token order: fp32, bf16 or fp16.
        log_decay, step: l and gamma, fp32 [S, P, H, C] (``kernels.triton.gates``), S = 1 or 2.
        layout: the chunk grid.
        tokens: rows of a tile: 16, 32 or 64.

    Returns:
        fp32 [2, P, H, tiles, tokens, tokens]; rows and columns without a token are those of the identity.
    """
    assert tokens in SIZES, f"tokens = {tokens}"
    key, value = (a.contiguous() for a in x)
    heads, d, v, c = key.shape[2], key.shape[3], value.shape[3], layout.chunk_size
    tiles = triton.cdiv(c, tokens)
    shape = (2, layout.num_chunks, heads, tiles, tokens, tokens)
    out = torch.empty(shape, dtype=torch.float32, device=key.device)
    _inverses[(layout.num_chunks * heads, tiles, 2)](
        key,
        value,
        log_decay,
        step,
        log_decay[0].numel() if log_decay.shape[0] == 2 else 0,
        out,
        *layout.chunk_tokens,
        heads,
        D=d,
        V=v,
        C=c,
        BD=padded(d),
        BV=padded(v),
        BT=tokens,
        PRECISION="ieee" if torch.float32 in (key.dtype, value.dtype) else "tf32",  # tf32 holds bf16 and fp16
        num_warps=_warps(tokens, max(padded(d), padded(v))),
    )
    return out


def _warps(tokens: int, width: int) -> int:
    """Enough for the blocks of X in registers: with four, 64 rows of 128 numbers would spill."""
    if tokens == 16:
        return 1 if width <= 64 else 2
    return 8 if tokens == 64 and width > 64 else 4


@triton.jit
def _inverses(
    key,
    value,
    log_decay,
    step,
    value_offset,
    out,
    first_token,
    lengths,
    heads,
    D: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (P * H, tiles, 2)."""
    if tl.program_id(2) == 0:
        _inverse(key, log_decay, step, out, first_token, lengths, heads, 0, D, C, BD, BT, PRECISION)
    else:
        log_decay += value_offset
        step += value_offset
        _inverse(value, log_decay, step, out, first_token, lengths, heads, 1, V, C, BV, BT, PRECISION)


@triton.jit
def _inverse(
    x,
    log_decay,
    step,
    out,
    first_token,
    lengths,
    heads,
    memory: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk_head = tl.program_id(0).to(tl.int64)
    chunk, head = chunk_head // heads, chunk_head % heads
    begin = tl.program_id(1).to(tl.int64) * BT
    token, length = tl.load(first_token + chunk) + begin, tl.load(lengths + chunk) - begin
    log_decay += chunk_head * C + begin
    step += chunk_head * C + begin
    x += (token * heads + head) * F
    stride = heads * F
    inverse = _eliminate(
        _block(x, stride, log_decay, step, length, True, 16, BT // 16, F, BF, PRECISION), BT // 16
    )
    if BT > 16:
        corner = _block(x, stride, log_decay, step, length, False, 16, BT // 32, F, BF, PRECISION)
        inverse = _merge(inverse, corner, 16, BT // 32)
    if BT > 32:
        corner = _block(x, stride, log_decay, step, length, False, 32, BT // 64, F, BF, PRECISION)
        inverse = _merge(inverse, corner, 32, BT // 64)
    index = (memory * tl.num_programs(0).to(tl.int64) + chunk_head) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.arange(0, BT)
    target = (index * BT + rows)[:, None] * BT + rows[None, :]
    tl.store(out + target, tl.reshape(inverse, (BT, BT)))


@triton.jit
def _block(
    x,
    stride,
    log_decay,
    step,
    length,
    DIAGONAL: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks of the strictly lower part of L, [COUNT, SIZE, SIZE].

    The diagonal blocks, or of each pair of neighbours the one below the diagonal.
    """
    r = tl.arange(0, SIZE)
    if DIAGONAL:
        j = (tl.arange(0, COUNT) * SIZE)[:, None] + r[None, :]
        i = j
    else:
        j = (tl.arange(0, COUNT) * (2 * SIZE))[:, None] + r[None, :]
        i = j + SIZE
    f = tl.arange(0, BF)[None, None, :]
    left = tl.load(x + i[:, :, None] * stride + f, mask=(i < length)[:, :, None] & (f < F), other=0.0)
    right = tl.load(x + j[:, :, None] * stride + f, mask=(j < length)[:, :, None] & (f < F), other=0.0)
    products = tl.dot(
        left.to(tl.float32), tl.permute(right.to(tl.float32), (0, 2, 1)), input_precision=PRECISION
    )
    log_i = tl.load(log_decay + i, mask=i < length, other=0.0)
    log_j = tl.load(log_decay + j, mask=j < length, other=0.0)
    gamma = tl.load(step + j, mask=j < length, other=0.0)
    keep = (i[:, :, None] > j[:, None, :]) & (i < length)[:, :, None]
    decay = tl.exp(tl.where(keep, log_i[:, :, None] - log_j[:, None, :], -float("inf")))
    return products * decay * gamma[:, None, :]


@triton.jit
def _eliminate(lower, COUNT: tl.constexpr):
    """(I + lower)^{-1} for strictly lower [COUNT, 16, 16]."""
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    inverse = tl.zeros((COUNT, 16, 16), tl.float32) + tl.where(row == column, 1.0, 0.0)
    for k in range(15):
        # Row k is final: it saw all columns before k.
        factor = tl.sum(tl.where(column == k, lower, 0.0), 2)
        pivot = tl.sum(tl.where(row == k, inverse, 0.0), 1)
        inverse -= factor[:, :, None] * pivot[:, None, :]
    return inverse


@triton.jit
def _merge(inverse, corner, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Inverses [COUNT, 2 SIZE, 2 SIZE] of pairs, from theirs [2 COUNT, SIZE, SIZE] and what is below them."""
    pairs = tl.permute(tl.reshape(inverse, (COUNT, 2, SIZE, SIZE)), (0, 2, 3, 1))
    first, second = tl.split(pairs)
    below = -tl.dot(second, tl.dot(corner, first, input_precision="ieee"), input_precision="ieee")
    upper = _beside(first, tl.zeros_like(first), SIZE, COUNT)
    lower = _beside(below, second, SIZE, COUNT)
    return tl.reshape(tl.permute(tl.join(upper, lower), (0, 3, 1, 2)), (COUNT, 2 * SIZE, 2 * SIZE))


@triton.jit
def _beside(left, right, SIZE: tl.constexpr, COUNT: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (COUNT, SIZE, 2 * SIZE))
