# mypy: allow-untyped-defs, allow-incomplete-defs
"""One token of every sequence in one launch; one program holds both memories of a head.

With o tokens of the current chunk consumed (shapes and pads as in ``kernels.triton.activations``):

    S' = S where o = 0
    stale        z = S' k;        u = J_phi(z)^T (phi(z) - alpha)
    corrected    S' = beta S';    z = S' k;    u = J_phi(z)^T (phi(z) - alpha) + beta S k - z
    S = beta S - gamma u k^T      (R, w, v and the value pass's gates alike)
    y = R^T f(S q);   o = (o + 1) mod C;   S' = S where now o = 0

Shapes: q, k [B, H, D]; v, y [B, H, V]; alpha [B, H, M]; gates [B, H]; readout affine [H, M]; memories [B, H,
M, .] in fp32. Everything is computed in fp32, with sums in registers instead of products of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.activations import apply_readout, inner_gradient
from kernels.triton.launch import Size, architecture, padded, parameters
from kernels.types import Operands, Rule

__all__ = ["State", "triton_decode"]

State = tuple[Tensor, Tensor, Tensor, Tensor]


def triton_decode(
    operands: Operands,
    state_tensors: State,
    offset: int | Tensor,
    *,
    chunk_size: int,
    rule: Rule,
    out: State | None = None,
    next_offset: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Consume one token of every sequence.

    Args:
        operands: of the token, without the T dimension.
        state_tensors: S, R, S', R' before the token, contiguous fp32; the pair is not read where o = 0.
        offset: o in [0, C), for all sequences, or one for each on the device, int32 or int64: [B], or [B, H]
            with the same number for every head. A captured graph of the step replays with a tensor.
        chunk_size, rule: C, and which function is computed.
        out: four tensors to write the state to; they may be ``state_tensors``. None leaves those untouched
            and may return some of them (a pair that did not change).
        next_offset: written with the new offsets, beside an ``offset`` tensor and of its shape. It may be
            ``offset`` itself if that is [B, H]: a sequence's heads do not wait for each other.

    Returns:
        y [B, H, V] in v's dtype, and the state after the token.
    """
    q, v = operands.q, operands.v
    given = [None if x is None else x.contiguous() for x in operands]
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in state_tensors), "memories as allocated"
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new, pair = _buffers(state_tensors, offset, chunk_size=chunk_size, rule=rule, out=out)
    by_head = isinstance(offset, Tensor) and offset.dim() == 2
    assert next_offset is None or next_offset is not offset or by_head, "offsets in place: one for each head"
    batch, heads, d = q.shape
    widths = {"d": d, "v": v.shape[2], "m": operands.alpha.shape[2]}
    size = Size(
        arch=architecture(q.device),
        d=d,
        v=widths["v"],
        m=widths["m"],
        c=chunk_size,
        corrected=rule.corrected,
        itemsize=2 if q.dtype == torch.bfloat16 else 4,
    )
    launch = parameters("decode", size)
    with torch.cuda.device_of(q):
        _decode[(batch * heads,)](
            *given,
            *state_tensors,
            offset,
            y,
            *new,
            *(pair or state_tensors[2:]),
            next_offset,
            heads,
            **{name.upper(): width for name, width in widths.items()},
            C=chunk_size,
            BD=padded(d),
            BV=padded(widths["v"]),
            BM=padded(widths["m"]),
            PHI=rule.phi,
            READOUT=rule.readout,
            CORRECTED=rule.corrected,
            HAS_OFFSETS=isinstance(offset, Tensor),
            BY_HEAD=by_head,
            PAIR=_stored(state_tensors, pair, rule),
            num_warps=launch.warps,
        )
    return y, (*new, *(pair or _unwritten_pair(state_tensors, new, offset, chunk_size)))


def _buffers(
    state: State, offset: int | Tensor, *, chunk_size: int, rule: Rule, out: State | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Where the new memories and the new pair go; None for a pair that needs no writing."""
    if out is not None:
        return out[:2], out[2:]
    new = torch.empty_like(state[0]), torch.empty_like(state[1])
    # One offset for all: the pair is the memories at a chunk's end, else under "stale" the old tensors.
    if isinstance(offset, int) and (not rule.corrected or offset + 1 == chunk_size):
        return new, None
    return new, (torch.empty_like(state[0]), torch.empty_like(state[1]))


def _unwritten_pair(
    state: State, new: tuple[Tensor, Tensor], offset: int | Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    assert isinstance(offset, int), "offsets on the device have their pair written"
    if offset + 1 == chunk_size:
        return new
    return state[2:] if offset else state[:2]


def _stored(state: State, pair: tuple[Tensor, Tensor] | None, rule: Rule) -> str:
    """Which tokens write the pair: none, all, or the first and last of a chunk (in place under "stale")."""
    if pair is None:
        return "none"
    in_place = all(a.data_ptr() == b.data_ptr() for a, b in zip(pair, state[2:], strict=True))
    return "ends" if in_place and not rule.corrected else "all"


@triton.jit
def _memory(head_of, M: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """Offsets [BM, BF] of a head's memory, and which of them exist."""
    m, f = tl.arange(0, BM)[:, None], tl.arange(0, BF)[None, :]
    return head_of * (M * F) + m * F + f, (m < M) & (f < F)


@triton.jit
def _load(memory, pair, first, head_of, M: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """(S, S') before the token."""
    offsets, inside = _memory(head_of, M, F, BM, BF)
    S = tl.load(memory + offsets, mask=inside, other=0.0)
    return S, tl.where(first, S, tl.load(pair + offsets, mask=inside & (not first), other=0.0))


@triton.jit
def _row(x, row, F: tl.constexpr, BF: tl.constexpr):
    """Row ``row`` of x [., F] in fp32, zero beyond F."""
    f = tl.arange(0, BF)
    return tl.load(x + row * F + f, mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def _write(
    S,
    start,
    x,
    alpha,
    log_decay,
    step,
    head_of,
    M: tl.constexpr,
    BM: tl.constexpr,
    PHI: tl.constexpr,
    CORRECTED: tl.constexpr,
):
    """(S, S') after the token with row x."""
    beta = tl.exp(tl.load(log_decay + head_of).to(tl.float32))
    gamma = tl.load(step + head_of).to(tl.float32)
    S = beta * S
    if CORRECTED:
        start = beta * start
    z = tl.sum(start * x[None, :], 1)
    keep = tl.arange(0, BM)[:, None] < M
    u = inner_gradient(z[:, None], alpha[:, None], keep, M * 1.0, PHI, 0)
    if CORRECTED:
        u += (tl.sum(S * x[None, :], 1) - z)[:, None]
    return S - gamma * u * x[None, :], start


@triton.jit
def _store(
    S,
    start,
    new,
    new_pair,
    first,
    last,
    head_of,
    M: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    PAIR: tl.constexpr,
):
    offsets, inside = _memory(head_of, M, F, BM, BF)
    tl.store(new + offsets, S, mask=inside)
    if PAIR != "none":  # noqa: SIM102 - one branch is taken at compile time
        if (PAIR == "all") | first | last:
            tl.store(new_pair + offsets, tl.where(last, S, start), mask=inside)


@triton.jit(do_not_specialize=["offset"])
def _decode(
    q,
    k,
    v,
    alpha,
    log_decay,
    step,
    value_log_decay,
    value_step,
    weight,
    bias,
    key_memory,
    value_memory,
    key_pair,
    value_pair,
    offset,
    y,
    key_new,
    value_new,
    key_pair_new,
    value_pair_new,
    next_offset,
    heads,
    D: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    PHI: tl.constexpr,
    READOUT: tl.constexpr,
    CORRECTED: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Grid (B * H)."""
    head_of = tl.program_id(0).to(tl.int64)
    sequence, head = head_of // heads, head_of % heads
    o = offset
    if HAS_OFFSETS:
        entry = head_of if BY_HEAD else sequence
        o = tl.load(offset + entry)
        if next_offset is not None:
            tl.debug_barrier()  # it may be ``offset``, which every warp has to have read
            tl.store(next_offset + entry, tl.where(o + 1 == C, 0, o + 1))
    first, last = o == 0, o + 1 == C
    S, start = _load(key_memory, key_pair, first, head_of, M, D, BM, BD)
    # Both memories are asked for before either is worked on where registers hold them: waits overlap.
    BOTH: tl.constexpr = BM * (BD + BV) <= 16384
    if BOTH:
        R, value_start = _load(value_memory, value_pair, first, head_of, M, V, BM, BV)
    target = _row(alpha, head_of, M, BM)
    S, start = _write(
        S, start, _row(k, head_of, D, BD), target, log_decay, step, head_of, M, BM, PHI, CORRECTED
    )
    _store(S, start, key_new, key_pair_new, first, last, head_of, M, D, BM, BD, PAIR)
    y_hat = tl.sum(S * _row(q, head_of, D, BD)[None, :], 1)
    w, b = None, None
    if weight is not None:
        w = _row(weight, head, M, BM)[None, :]
    if bias is not None:
        b = _row(bias, head, M, BM)[None, :]
    p = apply_readout(y_hat[None, :], w, b, (tl.arange(0, BM) < M)[None, :], M * 1.0, READOUT)
    if not BOTH:
        R, value_start = _load(value_memory, value_pair, first, head_of, M, V, BM, BV)
    if value_log_decay is not None:
        log_decay = value_log_decay
    if value_step is not None:
        step = value_step
    R, value_start = _write(
        R, value_start, _row(v, head_of, V, BV), target, log_decay, step, head_of, M, BM, PHI, CORRECTED
    )
    out = tl.sum(R * tl.sum(p, 0)[:, None], 0)
    f = tl.arange(0, BV)
    tl.store(y + head_of * V + f, out.to(y.dtype.element_ty), mask=f < V)
    _store(R, value_start, value_new, value_pair_new, first, last, head_of, M, V, BM, BV, PAIR)
