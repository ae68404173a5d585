"""The Triton backend: launches of the stage kernels and the autograd.Function over them.

Same composition as ``kernels.chunkwise``: forward scans, then reads out; backward recomputes the inner
gradients, takes the readout's local gradients in parallel, runs the reverse scan and finishes in parallel.
Forward keeps the operands and the memories at every chunk's start. Scratch is fp32 in chunk order [P, H, C,
.]; memories are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import ELEMENTWISE_PHI
from kernels.chunkwise import full_precision, last_starts, state_adjoints, with_pair
from kernels.layout import PackedLayout
from kernels.stages import Memories, derive_gates
from kernels.triton.inputs import inputs_kernel, writes_kernel
from kernels.triton.readout import key_backward_kernel, query_backward_kernel, readout_forward_kernel
from kernels.triton.scan import scan_backward_kernel, scan_forward_kernel

__all__ = ["triton_compress"]


def triton_compress(
    operands: tuple[Tensor, ...],
    initial: tuple[Tensor, Tensor],
    stale: tuple[Tensor, Tensor] | None,
    *,
    layout: PackedLayout,
    phi: str,
    readout: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Output, final memories and final chunk-start pair; arguments as in ``kernels.chunkwise.chunkwise``."""
    pair = (None, None) if stale is None else stale
    y, key, value, key_start, value_start = _Triton.apply(*operands, *initial, *pair, layout, phi, readout)  # type: ignore[no-untyped-call]
    return y, (key, value), (key_start, value_start)


@dataclass(frozen=True)
class _Call:
    """What every launch of one call shares."""

    key: Tensor  # k [B, T, H, D], contiguous
    value: Tensor
    alpha: Tensor
    log_decay: Tensor  # cumulative in the chunk [P, H, C]
    step: Tensor  # [P, H, C]
    layout: PackedLayout
    phi: str
    readout: str

    @staticmethod
    def of(operands: tuple[Tensor, ...], layout: PackedLayout, phi: str, readout: str) -> _Call:
        log_decay, step = (layout.to_chunks(x[..., None]).float() for x in operands[4:6])
        gates = derive_gates(log_decay, step, layout)
        key, value, alpha = (x.contiguous() for x in operands[1:4])
        return _Call(key, value, alpha, gates.log_decay, gates.step.squeeze(-1), layout, phi, readout)

    @property
    def heads(self) -> int:
        return self.key.shape[2]

    @property
    def slots(self) -> int:
        return self.alpha.shape[3]

    def sizes(self, *, scan: bool = False) -> dict[str, Any]:
        """Compile-time sizes: the operands', their powers of two, and the tiles of ``_tiles``."""
        d, v, c = self.key.shape[3], self.value.shape[3], self.layout.chunk_size
        tokens, slots, warps = _tiles(max(d, v), self.slots, c, blocks=scan and self.phi in ELEMENTWISE_PHI)
        low = self.key.dtype in (torch.bfloat16, torch.float16)
        return {
            "D": d,
            "V": v,
            "M": self.slots,
            "C": c,
            "BD": _padded(d),
            "BV": _padded(v),
            "BM": slots,
            "BT": tokens,
            "PRECISION": "tf32" if low and self.value.dtype == self.key.dtype else "ieee",
            "num_warps": warps,
            "num_stages": 1,
        }

    def scan_grid(self) -> tuple[int, int, int]:
        blocks = triton.cdiv(self.slots, self.sizes(scan=True)["BM"])
        return self.layout.num_documents * self.heads, 2, blocks

    def tile_grid(self) -> tuple[int, int, int]:
        tiles = triton.cdiv(self.layout.chunk_size, self.sizes()["BT"])
        return self.layout.num_chunks * self.heads, tiles, 2

    def scratch(self, width: int) -> Tensor:
        """fp32 [P, H, C, width]; every slot is written by a kernel before it is read."""
        layout = self.layout
        return self.step.new_empty(layout.num_chunks, self.heads, layout.chunk_size, width)

    def memories(self, count: int) -> Memories:
        shape = (count, self.heads, self.slots)
        return Memories(*(self.step.new_empty(*shape, x.shape[3]) for x in (self.key, self.value)))


def _padded(width: int) -> int:
    """Width of a tile: a power of two, and 16 at least, as tl.dot asks."""
    return max(16, 1 << (width - 1).bit_length())


def _tiles(width: int, slots: int, chunk_size: int, *, blocks: bool) -> tuple[int, int, int]:
    """(tokens, slots, warps) of a tile; a function of the sizes alone, so that runs repeat bitwise.

    ``blocks``: the kernel may split the slots. The scan is sequential: narrow blocks, many programs.
    """
    wide = _padded(slots)
    # 64 tokens beside heads or memories wider than 64 would need more shared memory than an SM has.
    tokens = min(64 if max(width, wide) <= 64 else 32, _padded(chunk_size))
    return tokens, min(32, wide) if blocks else wide, 4 if max(width, wide) <= 64 else 8


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        operands, initial, stale, (layout, phi, readout) = args[:6], args[6:8], args[8:10], args[10:]
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.phi, ctx.readout, ctx.own_pair = layout, phi, readout, stale[0] is not None
        with full_precision(operands[0]), torch.cuda.device_of(operands[0]):
            call = _Call.of(operands, layout, phi, readout)
            ranked = Memories(*(layout.rank_documents(x).contiguous() for x in initial))
            pair = Memories(*(layout.rank_documents(x).contiguous() for x in stale)) if ctx.own_pair else None
            start, final, gradients = _scan_forward(call, ranked, pair)
            y = _readout_forward(call, operands[0].contiguous(), start, gradients)
        at = start if pair is None else with_pair(start, pair)
        ctx.save_for_backward(
            *operands, *(x for m in ((start,) if pair is None else (start, at)) for x in _both(m))
        )
        last = (last_starts(layout, at.key, final.key), last_starts(layout, at.value, final.value))
        return y, *(layout.unrank_documents(x) for x in (final.key, final.value, *last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, operands, memories = ctx.layout, ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        start = Memories(*memories[:2])
        stale = Memories(*memories[2:]) if ctx.own_pair else start
        with full_precision(operands[0]), torch.cuda.device_of(operands[0]):
            call = _Call.of(operands, layout, ctx.phi, ctx.readout)
            query = operands[0].contiguous()
            dy = torch.zeros_like(call.value) if dy is None else dy.contiguous()
            adjoint, extra = state_adjoints(layout, start, dstates)
            gradients = _writes(call, stale)
            dquery, p, dy_hat, dlog = _query_backward(call, query, dy, start, gradients)
            dx, write = _key_backward(call, query, dy, p, dy_hat, gradients)
            scan = _scan_backward(
                call, query, dy, p, dy_hat, stale, write, adjoint, extra, own_pair=ctx.own_pair
            )
            rest = _inputs(call, start, stale, gradients, write, dx, dlog, scan)
        states = [layout.unrank_documents(x) for x in _both(scan.initial)]
        states += [layout.unrank_documents(x) for x in _both(scan.pair)] if scan.pair else [None, None]
        grads = [g.to(o.dtype).view_as(o) for g, o in zip((dquery, *rest), operands, strict=True)]
        return *grads, *states, None, None, None


@dataclass(frozen=True)
class _Scan:
    """The reverse scan: adjoints by rank [N, ...] and after each chunk [P, ...], dZ and dA [P, H, C, M]."""

    initial: Memories
    pair: Memories | None
    end: Memories
    dz: Memories
    dalpha: Tensor


def _both(memories: Memories) -> tuple[Tensor, Tensor]:
    return memories.key, memories.value


def _tables(call: _Call) -> tuple[Tensor, Tensor]:
    return call.layout.chunk_tokens


def _scan_forward(
    call: _Call, initial: Memories, pair: Memories | None
) -> tuple[Memories, Memories, Memories]:
    """Memories at chunk starts and at the end, inner gradients."""
    start, final = call.memories(call.layout.num_chunks), call.memories(call.layout.num_documents)
    gradients = Memories(call.scratch(call.slots), call.scratch(call.slots))
    scan_forward_kernel[call.scan_grid()](
        call.key,
        call.value,
        call.alpha,
        call.log_decay,
        call.step,
        *_both(initial),
        *_both(initial if pair is None else pair),
        *_both(start),
        *_both(final),
        *_both(gradients),
        *_tables(call),
        *call.layout.rank_chunks,
        call.heads,
        PHI=call.phi,
        HAS_PAIR=pair is not None,
        **call.sizes(scan=True),
    )
    return start, final, gradients


def _readout_forward(call: _Call, query: Tensor, start: Memories, gradients: Memories) -> Tensor:
    y = torch.empty_like(call.value)
    readout_forward_kernel[call.tile_grid()[:2]](
        query,
        call.key,
        call.value,
        call.log_decay,
        call.step,
        *_both(start),
        *_both(gradients),
        y,
        *_tables(call),
        call.heads,
        READOUT=call.readout,
        **call.sizes(),
    )
    return y


def _writes(call: _Call, stale: Memories) -> Memories:
    gradients = Memories(call.scratch(call.slots), call.scratch(call.slots))
    writes_kernel[call.tile_grid()](
        call.key,
        call.value,
        call.alpha,
        *_both(stale),
        *_both(gradients),
        *_tables(call),
        call.heads,
        PHI=call.phi,
        **call.sizes(),
    )
    return gradients


def _query_backward(
    call: _Call, query: Tensor, dy: Tensor, start: Memories, gradients: Memories
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ in token order, P, dYhat [P, H, C, M], Q.dQ + P.dP [P, H, C])."""
    dquery, dlog = torch.empty_like(query), torch.empty_like(call.step)
    p, dy_hat = call.scratch(call.slots), call.scratch(call.slots)
    query_backward_kernel[call.tile_grid()[:2]](
        query,
        call.key,
        call.value,
        dy,
        call.log_decay,
        call.step,
        *_both(start),
        *_both(gradients),
        dquery,
        p,
        dy_hat,
        dlog,
        *_tables(call),
        call.heads,
        READOUT=call.readout,
        **call.sizes(),
    )
    return dquery, p, dy_hat, dlog


def _key_backward(
    call: _Call, query: Tensor, dy: Tensor, p: Tensor, dy_hat: Tensor, gradients: Memories
) -> tuple[Memories, Memories]:
    """The readout's part of (dK, dV) and of the writes' gradients, chunk order."""
    dx = Memories(call.scratch(call.key.shape[3]), call.scratch(call.value.shape[3]))
    write = Memories(call.scratch(call.slots), call.scratch(call.slots))
    key_backward_kernel[call.tile_grid()[:2]](
        query,
        call.key,
        call.value,
        dy,
        call.log_decay,
        call.step,
        *_both(gradients),
        p,
        dy_hat,
        *_both(dx),
        *_both(write),
        *_tables(call),
        call.heads,
        **call.sizes(),
    )
    return dx, write


def _scan_backward(
    call: _Call,
    query: Tensor,
    dy: Tensor,
    p: Tensor,
    dy_hat: Tensor,
    stale: Memories,
    write: Memories,
    final: Memories,
    extra: Memories | None,
    *,
    own_pair: bool,
) -> _Scan:
    """Reverse scan; completes ``write`` in place."""
    documents, chunks = call.layout.num_documents, call.layout.num_chunks
    initial, end = call.memories(documents), call.memories(chunks)
    pair = call.memories(documents) if own_pair else None
    dz = Memories(call.scratch(call.slots), call.scratch(call.slots))
    dalpha = (call.scratch(call.slots), call.scratch(call.slots))
    scan_backward_kernel[call.scan_grid()](
        call.key,
        call.value,
        call.alpha,
        call.log_decay,
        call.step,
        *_both(stale),
        dy_hat,
        query,
        p,
        dy,
        *_both(write),
        *_both(stale if extra is None else extra),
        *_both(final),
        *_both(initial),
        *_both(initial if pair is None else pair),
        *_both(end),
        *_both(dz),
        *dalpha,
        *_tables(call),
        *call.layout.rank_chunks,
        call.heads,
        PHI=call.phi,
        HAS_PAIR=own_pair,
        HAS_EXTRA=extra is not None,
        **call.sizes(scan=True),
    )
    return _Scan(initial, pair, end, dz, dalpha[0].add_(dalpha[1]))


def _inputs(
    call: _Call,
    start: Memories,
    stale: Memories,
    gradients: Memories,
    write: Memories,
    dx: Memories,
    dlog: Tensor,
    scan: _Scan,
) -> tuple[Tensor, ...]:
    """(dK, dV, dalpha, dlog_decay, dstep) in token order."""
    dkey, dvalue = torch.empty_like(call.key), torch.empty_like(call.value)
    step_sums, end_sums = (torch.empty_like(call.step).repeat(2, 1, 1, 1) for _ in range(2))
    inputs_kernel[call.tile_grid()](
        call.key,
        call.value,
        *_both(stale),
        *_both(scan.end),
        *_both(gradients),
        *_both(write),
        *_both(scan.dz),
        *_both(dx),
        call.log_decay,
        call.step,
        dkey,
        dvalue,
        *step_sums,
        *end_sums,
        *_tables(call),
        call.heads,
        **call.sizes(),
    )
    dstep = step_sums.sum(0)
    dlog = dlog - dstep * call.step
    kept = sum((a * b).sum((-1, -2)) for a, b in zip(_both(start), _both(scan.end), strict=True))
    dlog[..., -1] += end_sums.sum((0, -1)) + kept * torch.exp(call.log_decay[..., -1])
    dlog = dlog.flip(-1).cumsum(-1).flip(-1)
    batch = call.key.shape[0]
    chunks = (scan.dalpha, dlog[..., None], dstep[..., None])
    return dkey, dvalue, *(call.layout.from_chunks(x, batch) for x in chunks)
