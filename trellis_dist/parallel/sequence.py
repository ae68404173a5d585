"""State passing: the compress operation over a sequence cut into segments, one segment per sp rank.

Shapes: B rows of L tokens (this segment), H heads, D and V head widths, M slots, N documents of this segment,
R rows (R = B; behind a packed row, where B = 1, the rows it holds).

    forward   (S, R) from the left; scan; (S, R) to the right; readout
    backward  readout gradients; (dS+, dR+) from the right; reverse scan; (dS, dR) to the left; the rest

The state leaves right after the scan and the adjoint right after the reverse scan, so a neighbour waits for
the short sequential part of a layer. Both directions are one autograd.Function over ``kernels.stages`` or,
on a GPU, their Triton form. The stages work chunk by chunk, so cut at a multiple of C no bit differs from one
process (parallelism.md). On a CPU that holds where B L H is a multiple of 32 and D, V, M are multiples of 8
(see ``kernels.stages``): what is left over after whole vectors goes through other routines in torch and MKL,
so at odd sizes some numbers differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import CompressState, PackedLayout
from kernels.checks import check_choices, check_grid, check_operands, check_state
from kernels.compress import stages_for, zero_state
from kernels.layout import check_chunk_size
from kernels.operator import find_layout, full_precision
from kernels.types import Memories, Operands, Rule
from trellis_dist.parallel.segments import Segments, row_ends
from trellis_dist.parallel.tables import table
from trellis_dist.parallel.transfers import Arrival, Transfers

__all__ = ["StatePassing"]


class StatePassing:
    """A mixer's operation, replaced: ``compress_kv`` of the whole sequence, computed on one segment.

    Args:
        transfers: the neighbours.
        segments: which rows of the current batch continue a document of the segment before.

    Attributes:
        entered: when set, called in the forward pass with the memories (S, R) [N, H, M, .] before the
            segment's documents.
    """

    def __init__(self, transfers: Transfers, segments: Segments) -> None:
        self._transfers = transfers
        self._segments = segments
        self.entered: Callable[[Tensor, Tensor], None] | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        log_decay: Tensor,
        step_size: Tensor,
        *,
        chunk_size: int,
        phi: str = "silu",
        readout: str = "ln_silu",
        update: str = "stale",
        value_log_decay: Tensor | None = None,
        value_step_size: Tensor | None = None,
        readout_weight: Tensor | None = None,
        readout_bias: Tensor | None = None,
        initial_state: CompressState | None = None,
        layout: PackedLayout | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, CompressState | None]:
        """Outputs y [B, L, H, V] of this segment; arguments as for ``kernels.compress_kv``.

        ``initial_state`` holds for documents that begin in this segment; the others continue what the left
        neighbour sends. The returned state is the one at the segment's end (the sequence's end on the last).

        Raises:
            ValueError: an argument that compress_kv refuses, a document of the segment that is no multiple of
                C, or a state that enters inside a chunk.
        """
        gates = (log_decay, step_size, value_log_decay, value_step_size)
        operands = Operands(q, k, v, alpha, *gates, readout_weight, readout_bias)
        check_operands(operands, dims="B, T, H", check_values=False)
        check_chunk_size(chunk_size)
        rows = self._segments.rows(q.shape[0], packed=layout is not None)
        offset = 0 if initial_state is None else initial_state.offset
        check_grid(operands, chunk_size, offset, layout)
        if layout is None:
            layout = find_layout(operands, None, [0], chunk_size)
        _check_chunks(layout, chunk_size, initial_state)
        first, last = row_ends(layout.lengths, rows)
        call = _Call(
            transfers=self._transfers,
            layout=layout,
            rule=Rule(phi, readout, update),
            first=first,
            last=last,
            continues=self._segments.continues(rows),
            entered=self.entered,
        )
        check_choices(call.rule)
        initial = _initial_memories(initial_state, layout.num_documents, operands)
        y, key, value = _PassStates.apply(call, *initial, *operands)  # type: ignore[no-untyped-call]
        return y, CompressState(key_memory=key, value_memory=value) if output_final_state else None


@dataclass(frozen=True)
class _Call:
    """What one call carries besides tensors; ``first`` and ``last`` name each row's outer documents."""

    transfers: Transfers
    layout: PackedLayout
    rule: Rule
    first: tuple[int, ...]
    last: tuple[int, ...]
    continues: tuple[bool, ...]
    entered: Callable[[Tensor, Tensor], None] | None


def _check_chunks(layout: PackedLayout, chunk_size: int, state: CompressState | None) -> None:
    ragged = [length for length in layout.lengths if length % chunk_size]
    if ragged:
        raise ValueError(
            f"a document of {ragged[0]} tokens in a segment is no multiple of the chunk size {chunk_size}: "
            "with mesh.sp > 1 segments and documents are cut at multiples of it"
        )
    if state is not None and state.inside_chunk:
        raise ValueError(
            f"initial_state has offset {state.offset}: with mesh.sp > 1 a state enters between chunks"
        )


def _initial_memories(
    state: CompressState | None, documents: int, operands: Operands
) -> tuple[Tensor, Tensor]:
    """Both memories [N, H, M, .] before each document, in the compute type."""
    dtype = operands.compute_dtype
    if state is None:
        state = zero_state(operands.q, operands.v, operands.alpha, documents, dtype)
    check_state(state, operands.q, operands.v, operands.alpha, documents)
    return state.key_memory.to(dtype), state.value_memory.to(dtype)


class _PassStates(torch.autograd.Function):
    """(call, S, R [N, H, M, .], operands in token order) -> y [B, L, H, V], S and R after each document."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, key: Tensor, value: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, layout, whole = call, call.layout, Operands(*operands)  # type: ignore[arg-type]
        stages = stages_for(whole, call.rule)
        own = [_pick(memory, call.first) for memory in (key, value)]
        arrival = call.transfers.expect_left(*own)
        with full_precision(key):
            inputs = stages.arrange(whole, layout=layout, rule=call.rule)
            initial = [key, value] if arrival is None else _continue((key, value), own, arrival, call)
            if call.entered is not None:
                call.entered(*initial)
            first = Memories(*map(layout.rank_documents, initial))
            states, end = stages.scan_forward(inputs, first)
            final = [layout.unrank_documents(memory) for memory in (end.key, end.value)]
            call.transfers.send_right(*(_pick(memory, call.last) for memory in final))
            y = stages.readout_forward(inputs, states)
            y = stages.to_tokens(inputs, y, whole.v)
        ctx.save_for_backward(states.saved.key, states.saved.value, *operands)
        return y, *final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        call, layout, (key, value, *saved) = ctx.call, ctx.call.layout, ctx.saved_tensors
        rows, operands = len(call.first), Operands(*saved)
        stages = stages_for(operands, call.rule)
        # Any tensors of the shape of one memory per row will do to size the receive.
        arrival = call.transfers.expect_right(key[:rows], value[:rows])
        with full_precision(key):
            inputs = stages.arrange(operands, layout=layout, rule=call.rule)
            states = stages.rescan(inputs, Memories(key, value))
            dy = torch.zeros_like(operands.v) if dy is None else dy
            grads = stages.readout_backward(inputs, states, stages.from_tokens(inputs, dy))
            final = _final_adjoints(dfinal, key, value, arrival, call)
            scan = stages.scan_backward(inputs, states, grads, final)
            dinitial = [layout.unrank_documents(d) for d in (scan.initial.key, scan.initial.value)]
            _hand_left(dinitial, call)
            rest = stages.input_backward(inputs, states, grads, scan)
            tokens = [
                None if d is None or x is None else stages.to_tokens(inputs, d, x)
                for d, x in zip(rest[:8], operands[:8], strict=True)
            ]
        affine = [None if d is None or x is None else d.to(x) for d, x in zip(rest[8:], operands[8:])]
        return None, *dinitial, *tokens, *affine


def _continue(
    memories: tuple[Tensor, Tensor], own: list[Tensor], arrival: Arrival, call: _Call
) -> list[Tensor]:
    """Initial memories [N, ...] with the received ones in the rows that continue."""
    received = arrival.wait()
    if not all(call.continues):
        mask = _row_mask(call, received[0])
        received = [torch.where(mask, theirs, ours) for theirs, ours in zip(received, own, strict=True)]
    if len(call.first) == len(memories[0]):
        return received
    index = table(call.first, torch.int64, memories[0].device)
    return [memory.index_copy(0, index, row) for memory, row in zip(memories, received, strict=True)]


def _final_adjoints(
    dfinal: tuple[Tensor | None, ...], key: Tensor, value: Tensor, arrival: Arrival | None, call: _Call
) -> tuple[Tensor, Tensor]:
    """Adjoints of the final memories, by rank [N, ...]: the caller's own plus the right neighbour's.

    ``key`` and ``value`` are memories [., H, M, .] like those that the adjoints belong to.
    """
    documents = call.layout.num_documents
    totals = [
        like.new_zeros(documents, *like.shape[1:]) if own is None else own.clone()
        for own, like in zip(dfinal, (key, value), strict=True)
    ]
    if arrival is not None:
        index = table(call.last, torch.int64, key.device)
        for total, received in zip(totals, arrival.wait(), strict=True):
            total.index_add_(0, index, received)
    return call.layout.rank_documents(totals[0]), call.layout.rank_documents(totals[1])


def _hand_left(dinitial: list[Tensor], call: _Call) -> None:
    """Send the adjoints of received memories left; in ``dinitial`` they become 0, being no input here."""
    if call.transfers.mesh.left is None:
        return
    outgoing = [_pick(d, call.first) for d in dinitial]
    if not all(call.continues):
        mask = _row_mask(call, dinitial[0])
        outgoing = [d.masked_fill(~mask, 0) for d in outgoing]
    call.transfers.send_left(*outgoing)
    received = tuple(row for row, continues in zip(call.first, call.continues, strict=True) if continues)
    for d in dinitial:
        d.index_fill_(0, table(received, torch.int64, d.device), 0)


def _pick(memories: Tensor, documents: tuple[int, ...]) -> Tensor:
    """Rows of [N, ...] in the given order; itself when that is all of them."""
    if len(documents) == len(memories):
        return memories
    return memories.index_select(0, table(documents, torch.int64, memories.device))


def _row_mask(call: _Call, like: Tensor) -> Tensor:
    """Whether each row continues, bool [R, 1, 1, 1]."""
    return table(call.continues, torch.bool, like.device).view(-1, 1, 1, 1)
