"""The portable backend: the stages of ``kernels.stages`` composed on one device with a hand-written backward.

Autograd never sees the loop over chunks. Forward keeps its inputs and the memories at every chunk's start
(2 T M D / C numbers per head); backward recomputes the rest. Shapes: q, k [B, T, H, D]; v [B, T, H, V];
alpha [B, T, H, M]; gates [B, T, H]; memories [N, H, M, .] in the caller's order of documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import stages
from kernels.layout import PackedLayout
from kernels.stages import Memories, ScanResult

__all__ = ["chunkwise", "full_precision", "last_starts", "state_adjoints", "with_pair"]

MATRICES = 64  # chunks x heads that a CPU works on at a time


def chunkwise(
    operands: tuple[Tensor, ...],
    initial: tuple[Tensor, Tensor],
    stale: tuple[Tensor, Tensor] | None,
    *,
    layout: PackedLayout,
    phi: str,
    readout: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Output, final memories and final chunk-start pair.

    Args:
        operands: (q, k, v, alpha, log_decay, step_size).
        initial: (key, value) memories [N, H, M, .] in the compute type.
        stale: the chunk-start pair of documents that are entered inside a chunk; None where all start a
            chunk.
        layout, phi, readout: as in ``compress_kv``.
    """
    pair = (None, None) if stale is None else stale
    y, key, value, key_start, value_start = _Chunkwise.apply(*operands, *initial, *pair, layout, phi, readout)  # type: ignore[no-untyped-call]
    return y, (key, value), (key_start, value_start)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        operands, initial, stale, (layout, phi, readout) = args[:6], args[6:8], args[8:10], args[10:]
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.phi, ctx.readout, ctx.own_pair = layout, phi, readout, stale[0] is not None
        pair = Memories(*(layout.rank_documents(x) for x in stale)) if ctx.own_pair else None
        final = Memories(*(layout.rank_documents(x).clone() for x in initial))
        with full_precision(operands[0]):
            y, start = _forward(operands, final, pair, layout, phi=phi, readout=readout)
        at = start if pair is None else with_pair(start, pair)
        ctx.save_for_backward(*operands, *_unique(start, at))
        last = [last_starts(layout, *x) for x in ((at.key, final.key), (at.value, final.value))]
        y = layout.from_chunks(y, operands[0].shape[0]).to(operands[2].dtype)
        return y, *(layout.unrank_documents(x) for x in (final.key, final.value, *last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, operands, memories = ctx.layout, ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        start = Memories(*memories[:2])
        stale = Memories(*memories[2:]) if ctx.own_pair else start
        adjoint, extra = state_adjoints(layout, start, dstates)
        with full_precision(operands[0]):
            chunks, pair = _backward(
                operands, start, stale, dy, adjoint, extra, layout, phi=ctx.phi, readout=ctx.readout
            )
        batch = operands[0].shape[0]
        grads = [
            layout.from_chunks(x, batch).to(o.dtype).view_as(o) for x, o in zip(chunks, operands, strict=True)
        ]
        states = [layout.unrank_documents(x) for x in (adjoint.key, adjoint.value)]
        states += (
            [None, None] if pair is None else [layout.unrank_documents(x) for x in (pair.key, pair.value)]
        )
        return *grads, *states, None, None, None


def _forward(
    operands: tuple[Tensor, ...],
    state: Memories,
    pair: Memories | None,
    layout: PackedLayout,
    *,
    phi: str,
    readout: str,
) -> tuple[Tensor, Memories]:
    """Outputs and chunk-start memories in chunk order; ``state`` becomes the final memories in place."""
    chunks, (heads, slots) = layout.num_chunks, operands[3].shape[-2:]
    y = state.value.new_empty(chunks, heads, layout.chunk_size, operands[2].shape[-1])
    start = Memories(*(m.new_empty(chunks, heads, slots, m.shape[-1]) for m in (state.key, state.value)))
    for span, at, running in _spans(layout, heads):
        inputs = stages.arrange(*operands, layout=span)
        states, gradients = stages.scan_forward(inputs, _cut(state, running), phi=phi, stale=pair)
        y[at] = stages.readout_forward(inputs, states, gradients, readout=readout)
        _assign(_cut(start, at), states.start)
        _assign(_cut(state, running), states.final)
        pair = None  # the documents entered inside a chunk are past it
    return y, start


def _backward(
    operands: tuple[Tensor, ...],
    start: Memories,
    stale: Memories,
    dy: Tensor | None,
    adjoint: Memories,
    extra: Memories | None,
    layout: PackedLayout,
    *,
    phi: str,
    readout: str,
) -> tuple[list[Tensor], Memories | None]:
    """Operand gradients in chunk order; ``adjoint`` goes from the final to the initial memories in place."""
    heads, c = operands[3].shape[2], layout.chunk_size
    widths = [x.shape[3] if x.dim() == 4 else 1 for x in operands]
    out = [start.key.new_empty(layout.num_chunks, heads, c, width) for width in widths]
    pair = None
    for span, at, running in reversed(_spans(layout, heads)):
        inputs = stages.arrange(*operands, layout=span)
        first = _cut(start, at)
        states = ScanResult(
            final=first,  # not read by the backward stages
            start=first,
            stale=first if span.first_step > 0 or stale is start else _cut(stale, at),
        )
        dy_span = torch.zeros_like(inputs.value) if dy is None else span.to_chunks(dy).to(inputs.value.dtype)
        grads = stages.readout_backward(inputs, states, dy_span, phi=phi, readout=readout)
        outside = None if extra is None else _cut(extra, at)
        scan = stages.scan_backward(
            inputs, states, grads, _cut(adjoint, running), phi=phi, stale_adjoint=outside
        )
        _assign(_cut(adjoint, running), scan.initial)
        rest, pair = stages.input_backward(inputs, states, grads, scan), scan.initial_stale
        parts = (grads.query, rest.key, rest.value, rest.alpha, rest.log_decay, rest.step_size)
        for whole, part in zip(out, parts, strict=True):
            whole[at] = part
    return out, pair


def _spans(layout: PackedLayout, heads: int) -> list[tuple[PackedLayout, slice, slice]]:
    """Pieces to run one after the other, the chunks of each, and the documents running in it.

    On a CPU a piece is just large enough to keep the matrix products busy, so that what the stages hand to
    each other stays in cache; on a GPU it is the whole.
    """
    chunks = -(-MATRICES // heads) if layout.last_chunk.device.type == "cpu" else layout.num_chunks
    pieces, first = [], 0
    for span in layout.spans(chunks):
        count = span.steps[-1][1]
        pieces.append((span, slice(first, first + count), slice(0, span.steps[0][1])))
        first += count
    return pieces


def _cut(memories: Memories, at: slice) -> Memories:
    return Memories(memories.key[at], memories.value[at])


def _assign(target: Memories, source: Memories) -> None:
    target.key.copy_(source.key)
    target.value.copy_(source.value)


def with_pair(start: Memories, pair: Memories) -> Memories:
    """Stale memories of every chunk: those at its start, in each document's first chunk the carried ones."""
    both = ((pair.key, start.key), (pair.value, start.value))
    return Memories(*(torch.cat((carried, own[carried.shape[0] :])) for carried, own in both))


def _unique(start: Memories, stale: Memories) -> tuple[Tensor, ...]:
    pairs = (start,) if stale is start else (start, stale)
    return tuple(x for pair in pairs for x in (pair.key, pair.value))


def last_starts(layout: PackedLayout, stale: Tensor, final: Tensor) -> Tensor:
    """Chunk-start memory of the token after each document's last, by rank [N, H, M, .]."""
    if layout.ends_inside is None:
        return final.clone()
    return torch.where(layout.ends_inside.view(-1, 1, 1, 1), stale[layout.last_chunk], final)


def state_adjoints(
    layout: PackedLayout, start: Memories, dstates: tuple[Tensor | None, ...]
) -> tuple[Memories, Memories | None]:
    """Adjoints of the final memories [N, ...] and, from a chunk-start pair, of the stale ones [P, ...]."""
    key, key_extra = _state_adjoint(layout, start.key, dstates[0], dstates[2])
    value, value_extra = _state_adjoint(layout, start.value, dstates[1], dstates[3])
    if key_extra is None and value_extra is None:
        return Memories(key, value), None
    key_extra = torch.zeros_like(start.key) if key_extra is None else key_extra
    value_extra = torch.zeros_like(start.value) if value_extra is None else value_extra
    return Memories(key, value), Memories(key_extra, value_extra)


def _state_adjoint(
    layout: PackedLayout, start: Tensor, dfinal: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One memory: a document's chunk-start memory is its final one, or its last chunk's stale one."""
    total = start.new_zeros(layout.num_documents, *start.shape[1:])
    if dfinal is not None:
        total += layout.rank_documents(dfinal)
    if dlast is None:
        return total, None
    dlast = layout.rank_documents(dlast)
    if layout.ends_inside is None:
        return total + dlast, None
    inside = layout.ends_inside.view(-1, 1, 1, 1)
    extra = torch.zeros_like(start)
    extra[layout.last_chunk] = dlast.masked_fill(~inside, 0)
    return total + dlast.masked_fill(inside, 0), extra


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: memories and gates stay fp32 whatever surrounds the call."""
    return torch.autocast(device_type=x.device.type, enabled=False)
