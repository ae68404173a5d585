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
from kernels.stages import Inputs, Memories, ScanResult

__all__ = ["chunkwise"]


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
        stale: the chunk-start pair of documents that are entered inside a chunk; None where all start a chunk.
        layout, phi, readout: as in ``compress_kv``.
    """
    pair = (None, None) if stale is None else stale
    y, key, value, key_start, value_start = _Chunkwise.apply(*operands, *initial, *pair, layout, phi, readout)
    return y, (key, value), (key_start, value_start)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        operands, initial, stale, (layout, phi, readout) = args[:6], args[6:8], args[8:10], args[10:]
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.phi, ctx.readout, ctx.own_pair = layout, phi, readout, stale[0] is not None
        with _full_precision(operands[0]):
            inputs = stages.arrange(*operands, layout=layout)
            pair = None if stale[0] is None else Memories(*(layout.rank_documents(x) for x in stale))
            ranked = Memories(*(layout.rank_documents(x) for x in initial))
            states, gradients = stages.scan_forward(inputs, ranked, phi=phi, stale=pair)
            y = stages.readout_forward(inputs, states, gradients, readout=readout)
            y = layout.from_chunks(y, operands[0].shape[0]).to(operands[2].dtype)
        pairs = (states.start, states.stale) if ctx.own_pair else (states.start,)
        ctx.save_for_backward(*operands, *(x for pair in pairs for x in (pair.key, pair.value)))
        last = (_last_starts(layout, states.stale.key, states.final.key),)
        last += (_last_starts(layout, states.stale.value, states.final.value),)
        return y, *(layout.unrank_documents(x) for x in (states.final.key, states.final.value, *last))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor | None, *dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, saved = ctx.layout, ctx.saved_tensors
        operands, start = saved[:6], Memories(*saved[6:8])
        stale = Memories(*saved[8:10]) if ctx.own_pair else start
        with _full_precision(operands[0]):
            inputs = stages.arrange(*operands, layout=layout)
            dy_chunks = (
                torch.zeros_like(inputs.value) if dy is None else layout.to_chunks(dy).to(inputs.value.dtype)
            )
            final, extra = _state_adjoints(layout, start, dstates)
            states = ScanResult(
                final=final, start=start, stale=stale
            )  # backward never reads the final memories
            grads = stages.readout_backward(inputs, states, dy_chunks, phi=ctx.phi, readout=ctx.readout)
            scan = stages.scan_backward(inputs, states, grads, final, phi=ctx.phi, stale_adjoint=extra)
            rest = stages.input_backward(inputs, states, grads, scan)
            chunks = (grads.query, rest.key, rest.value, rest.alpha, rest.log_decay, rest.step_size)
            douts = [
                layout.from_chunks(x, operands[0].shape[0]).to(o.dtype) for x, o in zip(chunks, operands)
            ]
            pairs = [scan.initial] + ([scan.initial_stale] if scan.initial_stale is not None else [])
            dinitial = [layout.unrank_documents(x) for pair in pairs for x in (pair.key, pair.value)]
        dinitial += [None] * (4 - len(dinitial))
        return *(x.view_as(o) for x, o in zip(douts, operands)), *dinitial, None, None, None


def _last_starts(layout: PackedLayout, stale: Tensor, final: Tensor) -> Tensor:
    """Chunk-start memory of the token after each document's last, by rank [N, H, M, .]."""
    if layout.ends_inside is None:
        return final.clone()
    return torch.where(layout.ends_inside.view(-1, 1, 1, 1), stale[layout.last_chunk], final)


def _state_adjoints(
    layout: PackedLayout, start: Memories, dstates: tuple[Tensor | None, ...]
) -> tuple[Memories, Memories | None]:
    """Adjoints of the final memories [N, ...] and, from a returned chunk-start pair, of the stale ones [P, ...]."""
    final, extra, used = [], [], False
    for dstate, dlast, like in ((dstates[0], dstates[2], start.key), (dstates[1], dstates[3], start.value)):
        total = like.new_zeros(layout.num_documents, *like.shape[1:])
        if dstate is not None:
            total += layout.rank_documents(dstate)
        stale = torch.zeros_like(like) if dlast is not None and layout.ends_inside is not None else None
        if dlast is not None:
            last = layout.rank_documents(dlast)
            if stale is not None and layout.ends_inside is not None:
                inside = layout.ends_inside.view(-1, 1, 1, 1)
                stale[layout.last_chunk] = last.masked_fill(~inside, 0)
                last = last.masked_fill(inside, 0)
            total += last
        used = used or stale is not None
        final.append(total)
        extra.append(stale)
    if not used:
        return Memories(*final), None
    filled = [
        torch.zeros_like(x) if e is None else e for e, x in zip(extra, (start.key, start.value), strict=True)
    ]
    return Memories(*final), Memories(*filled)


def _full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: memories and gates stay fp32 whatever surrounds the call."""
    return torch.autocast(device_type=x.device.type, enabled=False)
