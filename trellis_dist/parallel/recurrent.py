"""The recurrent baselines over a sequence cut into segments: memories passed on, or heads exchanged.

Shapes: B rows of L tokens (this segment), H heads, N documents of this segment, R rows (R = B; behind a
packed row, where B = 1, the rows it holds).

    state passing  memories from the left -> operation -> memories to the right; backward the opposite
    all-to-all     segments of all heads -> whole rows of some heads -> operation -> back (all_to_all.py)

Both go around any `kernels.baselines.grid.Operation`. Unlike `parallel.sequence`, which hands the memories on
before it reads them, a rank finishes the operation first: a neighbour waits for the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import PackedLayout
from kernels.baselines.grid import Memory, Operation
from trellis_dist.parallel.all_to_all import AllToAll, whole_memory
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments, row_ends
from trellis_dist.parallel.tables import table
from trellis_dist.parallel.transfers import Transfers

__all__ = ["AllToAllRecurrent", "PassMemory"]


class PassMemory:
    """A mixer's operation, replaced: the same of the whole sequence, computed on one segment.

    Args:
        inner: the operation.
        transfers: the neighbours.
        segments: which rows of the current batch continue a document of the segment before.
    """

    def __init__(self, inner: Operation, transfers: Transfers, segments: Segments) -> None:
        self._inner, self._transfers, self._segments = inner, transfers, segments

    def __call__(
        self,
        tokens: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        memory: Memory,
        layout: PackedLayout,
    ) -> tuple[Tensor, Memory]:
        """See `Operation`; ``memory`` holds for documents that begin in this segment.

        Raises:
            ValueError: a document of the segment is no multiple of the chunk size.
        """
        _check_chunks(layout)
        batch = len(next(iter(tokens.values())))
        rows = self._segments.rows(batch, packed=layout.num_documents != batch)
        call = _Call(
            self._transfers, *row_ends(layout.lengths, rows), continues=self._segments.continues(rows)
        )
        # All that may need a gradient goes through the node, so that every rank runs its transfer in the
        # backward pass, whatever autograd leaves out of it.
        through = _Enter.apply(call, len(memory), *memory, *tokens.values(), *weights.values())  # type: ignore[no-untyped-call]
        entering, rest = through[: len(memory)], iter(through[len(memory) :])
        tokens = dict(zip(tokens, rest))  # the weights follow
        weights = dict(zip(weights, rest, strict=True))
        y, final = self._inner(tokens, weights, entering, layout)
        return _Leave.apply(call, y, *final), final  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Call:
    """What one call carries besides tensors; ``first`` and ``last`` name each row's outer documents."""

    transfers: Transfers
    first: tuple[int, ...]
    last: tuple[int, ...]
    continues: tuple[bool, ...]


def _check_chunks(layout: PackedLayout) -> None:
    ragged = [length for length in layout.lengths if length % layout.chunk_size]
    if ragged:
        raise ValueError(
            f"a document of {ragged[0]} tokens in a segment is no multiple of the chunk size "
            f"{layout.chunk_size}: with mesh.sp > 1 segments and documents are cut at multiples of it"
        )


class _Enter(torch.autograd.Function):
    """(call, n, n memories [N, ...], others) -> memories, from the left where rows continue; the others."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.count = call, count
        memory, others = inputs[:count], [x.view_as(x) for x in inputs[count:]]
        needed = ctx.needs_input_grad[2 + count :]
        ctx.mark_non_differentiable(*(x for x, need in zip(others, needed, strict=True) if not need))
        own = [_pick(m, call.first) for m in memory]
        arrival = call.transfers.expect_left(*own)
        if arrival is None:
            return *(m.view_as(m) for m in memory), *others
        index = table(call.first, torch.int64, memory[0].device)
        received = [
            torch.where(_mask(call, theirs), theirs, ours)
            for theirs, ours in zip(arrival.wait(), own, strict=True)
        ]
        return *(m.index_copy(0, index, r) for m, r in zip(memory, received, strict=True)), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, dmemory, rest = ctx.call, grads[: ctx.count], grads[ctx.count :]
        if call.transfers.mesh.left is None:
            return None, None, *dmemory, *rest
        outgoing = [_pick(d, call.first) for d in dmemory]
        call.transfers.send_left(*(d.masked_fill(~_mask(call, d), 0) for d in outgoing))
        received = tuple(row for row, continues in zip(call.first, call.continues, strict=True) if continues)
        index = table(received, torch.int64, dmemory[0].device)
        # No inputs here, so no gradient.
        return None, None, *(d.index_fill(0, index, 0) for d in dmemory), *rest


class _Leave(torch.autograd.Function):
    """(call, y, memories after each document [N, ...]) -> y; the rows' last memories go right."""

    @staticmethod
    def forward(ctx: Any, call: _Call, y: Tensor, *final: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*(m[:0] for m in final))
        ctx.shapes = [m.shape for m in final]
        call.transfers.send_right(*(_pick(m, call.last) for m in final))
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call, like = ctx.call, ctx.saved_tensors
        rows = len(call.last)
        arrival = call.transfers.expect_right(*(m.new_empty(rows, *m.shape[1:]) for m in like))
        if arrival is None:
            return None, dy, *(None for _ in like)
        index = table(call.last, torch.int64, dy.device)
        totals = [m.new_zeros(shape) for m, shape in zip(like, ctx.shapes, strict=True)]
        for total, received in zip(totals, arrival.wait(), strict=True):
            total.index_copy_(0, index, received)
        return None, dy, *totals


def _pick(memory: Tensor, documents: tuple[int, ...]) -> Tensor:
    """Rows of [N, ...] in the given order."""
    return memory.index_select(0, table(documents, torch.int64, memory.device))


def _mask(call: _Call, like: Tensor) -> Tensor:
    """Whether each row continues, bool [R, 1, ...]."""
    return table(call.continues, torch.bool, like.device).view(-1, *[1] * (like.dim() - 1))


class AllToAllRecurrent(AllToAll):
    """A mixer's operation, replaced: the same of whole rows for this rank's share of the heads.

    Args:
        inner: the operation.
        mesh: its sp_group carries the exchange.
        segments: the documents of the current batch's whole rows.
    """

    def __init__(self, inner: Operation, mesh: Mesh, segments: Segments) -> None:
        super().__init__(mesh, segments)
        self.inner = inner

    def __call__(
        self,
        tokens: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        memory: Memory,
        layout: PackedLayout,
    ) -> tuple[Tensor, Memory]:
        """See `Operation`; y [B, L, H, V] of this segment, and no memories: a rank has those of its heads.

        Per-head weights come whole; the gradient of the other heads is 0 here, and the sum over sp completes
        it. ``memory`` is one expanded to all documents.

        Raises:
            ValueError: memories that differ between packed documents.
        """
        first = next(iter(tokens.values()))
        rows = self.segments.rows(len(first), packed=layout.num_documents != len(first))
        whole = self.segments.whole_rows(rows, first.device)
        own = whole.layout(layout.chunk_size)
        if own is None:
            length = first.shape[1] * self.mesh.sp
            own = PackedLayout.uniform(rows, length, layout.chunk_size).to(first.device)
        heads = self._heads(first.shape[2])
        share = {name: weight[heads] for name, weight in weights.items()}
        entering = tuple(whole_memory(m, rows, own.num_documents)[:, heads] for m in memory)
        exchanged = self._whole(list(tokens.values()), rows, packed=whole.packed)
        y, _ = self.inner(dict(zip(tokens, exchanged, strict=True)), share, entering, own)
        return self._segment(y, rows, like=tokens["v"]), ()
