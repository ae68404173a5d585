# mypy: allow-untyped-defs, allow-incomplete-defs
"""Addresses and loads shared by the kernels.

Big operands stay in token order [B * T, H, F]; a chunk's tokens lie together there, so a chunk is its first
token and its length. Gates and scratch are in chunk order [P, H, C, .]. Token and chunk numbers are int64
before they meet a stride. Everything is loaded as fp32; a dot multiplies in PRECISION and accumulates in
fp32. PRECISION is "ieee" for fp32 operands. For bf16 and fp16 ones it is "tf32", which holds their every
value and rounds the fp32 partners (memories, writes) to 11 bits on the way into a product, not in storage.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dot", "load_memory", "load_scratch", "load_tokens", "omega", "store_memory", "store_scratch"]
__all__ += ["store_tokens"]


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _token_offsets(token, j, head, heads, F: tl.constexpr, BF: tl.constexpr):
    f = tl.arange(0, BF)
    return ((token + j) * heads + head)[:, None] * F + f[None, :], (f < F)[None, :]


@triton.jit
def load_tokens(x, token, j, valid, head, heads, F: tl.constexpr, BF: tl.constexpr):
    """Rows ``token + j`` of x [B * T, H, F] as [rows, BF]; zero where not ``valid``."""
    offsets, columns = _token_offsets(token, j, head, heads, F, BF)
    return tl.load(x + offsets, mask=valid[:, None] & columns, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, value, token, j, valid, head, heads, F: tl.constexpr, BF: tl.constexpr):
    """Counterpart of ``load_tokens``."""
    offsets, columns = _token_offsets(token, j, head, heads, F, BF)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=valid[:, None] & columns)


@triton.jit
def load_scratch(x, chunk_head, j, columns, C: tl.constexpr, F: tl.constexpr):
    """Rows j of chunk ``chunk_head`` of x [P * H, C, F] as [rows, columns]; zero outside."""
    offsets = (chunk_head * C + j)[:, None] * F + columns[None, :]
    return tl.load(x + offsets, mask=(j < C)[:, None] & (columns < F)[None, :], other=0.0)


@triton.jit
def store_scratch(x, value, chunk_head, j, columns, C: tl.constexpr, F: tl.constexpr):
    """Counterpart of ``load_scratch``."""
    offsets = (chunk_head * C + j)[:, None] * F + columns[None, :]
    tl.store(x + offsets, value, mask=(j < C)[:, None] & (columns < F)[None, :])


@triton.jit
def load_memory(x, index, slots, M: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Rows ``slots`` of memory ``index`` of x [., M, F] as [rows, BF]; zero outside."""
    f = tl.arange(0, BF)
    offsets = (index * M + slots)[:, None] * F + f[None, :]
    return tl.load(x + offsets, mask=(slots < M)[:, None] & (f < F)[None, :], other=0.0)


@triton.jit
def store_memory(x, value, index, slots, M: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Counterpart of ``load_memory``."""
    f = tl.arange(0, BF)
    offsets = (index * M + slots)[:, None] * F + f[None, :]
    tl.store(x + offsets, value, mask=(slots < M)[:, None] & (f < F)[None, :])


@triton.jit
def omega(log_i, log_j, i, j, length):
    """e^{l_i - l_j} for j <= i < length, else 0; the exponent is masked before exp."""
    keep = (i[:, None] >= j[None, :]) & (i < length)[:, None]
    return tl.exp(tl.where(keep, log_i[:, None] - log_j[None, :], -float("inf")))
