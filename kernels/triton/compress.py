"""The Triton backend: the stages of ``kernels.triton.stages`` composed on one device.

Forward keeps the memories at segment starts; backward scans all segments again side by side, takes the
readout's local gradients in parallel, runs the reverse scan and finishes in parallel. Shapes as in
``kernels.chunkwise``, whose interface this is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import carry
from kernels.layout import PackedLayout
from kernels.triton import stages
from kernels.types import Memories, Operands, Rule

__all__ = ["backward", "forward", "saved_count"]

_Pair = tuple[Tensor | None, Tensor | None]


def forward(
    operands: Operands,
    initial: Memories,
    stale: Memories | None,
    *,
    layout: PackedLayout,
    rule: Rule,
) -> tuple[Tensor, Memories, Memories, Memories]:
    """Output, final memories, final chunk-start pair, and the memories at segment starts [G, H, M, .].

    Arguments as in ``kernels.chunkwise.forward``; fp32 memories.
    """
    with torch.cuda.device_of(operands.q):
        inputs = stages.arrange(operands, layout=layout, rule=rule)
        pair = None if stale is None else _ranked(layout, stale)
        states, final = stages.scan_forward(inputs, _ranked(layout, initial), stale=pair)
        y = stages.readout_forward(inputs, states)
    assert states.last is not None, "a forward scan has it"
    assert states.saved is not None, "a forward scan has them"
    return y, _unranked(layout, final), _unranked(layout, states.last), states.saved


def backward(
    operands: Operands,
    saved: Memories,
    stale: Memories | None,
    dy: Tensor | None,
    dfinal: _Pair,
    dstart: _Pair,
    *,
    layout: PackedLayout,
    rule: Rule,
) -> tuple[Operands, Memories, Memories | None]:
    """Gradients of the operands, the initial memories and the stale pair (None without one).

    Arguments as in ``kernels.chunkwise.backward``.
    """
    with torch.cuda.device_of(operands.q):
        inputs = stages.arrange(operands, layout=layout, rule=rule)
        pair = None if stale is None else _ranked(layout, stale)
        states = stages.rescan(inputs, saved, stale=pair)
        dy = torch.zeros_like(inputs.operands.v) if dy is None else dy
        grads = stages.readout_backward(inputs, states, dy)
        key, key_outside = _adjoint(layout, dfinal[0], dstart[0])
        value, value_outside = _adjoint(layout, dfinal[1], dstart[1])
        outside = (key_outside, value_outside)
        scan = stages.scan_backward(inputs, states, grads, (key, value), outside=outside)
        rest = stages.input_backward(inputs, states, grads, scan)
    dstale = None if scan.stale is None else _unranked(layout, scan.stale)
    return rest, _unranked(layout, scan.initial), dstale


def saved_count(shape: Sequence[int], chunk_size: int, *, offset: int, device: torch.device) -> int:
    """G for rows of equal length, from B, T, H (symbolic or not)."""
    batch, length, _ = shape
    every = stages.segment_chunks(chunk_size)
    chunks = (offset + length + chunk_size - 1) // chunk_size
    count: int = (chunks + every - 1) // every * batch
    return count


def _adjoint(layout: PackedLayout, dfinal: Tensor | None, dlast: Tensor | None) -> _Pair:
    """Adjoints by rank: of a final memory, and of the chunk-start one where documents end inside a chunk."""
    dfinal, dlast = (None if x is None else layout.rank_documents(x).contiguous() for x in (dfinal, dlast))
    if dlast is None:
        return dfinal, None
    inside = layout.ends_inside
    outside = None if inside is None else dlast.masked_fill(~inside.view(-1, 1, 1, 1), 0)
    return carry.adjoint_of_last(layout, dfinal, dlast, dlast), outside


def _ranked(layout: PackedLayout, memories: Memories) -> Memories:
    return Memories(*(layout.rank_documents(x).contiguous() for x in (memories.key, memories.value)))


def _unranked(layout: PackedLayout, memories: Memories) -> Memories:
    return Memories(*(layout.unrank_documents(x) for x in (memories.key, memories.value)))
