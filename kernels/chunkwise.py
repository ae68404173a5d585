"""The portable backend: the stages of ``kernels.stages`` composed on one device with a hand-written backward.

Autograd never sees the loop over chunks. Forward and backward run over pieces of the sequence (spans of scan
steps), the pieces one after the other. What is kept between them is the operands and the memories at every
piece's start; backward runs each piece's scan again. Shapes: q, k [B, T, H, D]; v [B, T, H, V]; alpha
[B, T, H, M]; gates [B, T, H]; memories [N, H, M, .] in the caller's order of documents, by rank inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import carry, stages
from kernels.layout import PackedLayout
from kernels.types import Memories, Operands, Rule

__all__ = ["backward", "forward", "read", "saved_count"]

# On a CPU a piece is just large enough to keep the matrix products busy (chunks x heads) and for the memory
# at its start to be small beside its tokens, so that what the stages hand to each other stays in cache. No
# scan step is larger than that either: many documents run in bands, one after the other.
MATRICES = 64
TOKENS = 128

_Ending = tuple[Tensor, Tensor] | None


def forward(
    operands: Operands,
    initial: Memories,
    stale: Memories | None,
    *,
    layout: PackedLayout,
    rule: Rule,
) -> tuple[Tensor, Memories, Memories, Memories]:
    """Output, final memories, final chunk-start pair, and the memories at piece starts that backward needs.

    Args:
        operands: in token order.
        initial: memories [N, H, M, .] in the compute type.
        stale: the chunk-start pair of documents that are entered inside a chunk; None where all start a
            chunk.
        layout, rule: the chunk grid and the function.

    Returns:
        y [B, T, H, V] in v's dtype; two pairs [N, H, M, .]; saved memories [G, H, M, .], G as
        ``saved_count`` says.
    """
    ranked, pair = _ranked(layout, initial), None if stale is None else _ranked(layout, stale)
    memory = Memories(ranked.key.clone(), ranked.value.clone())
    heads, y = operands.v.shape[2], operands.v.new_empty(operands.v.shape)
    saved: list[Memories] = []
    endings: list[tuple[_Ending, _Ending]] = []
    for piece in _pieces(layout, heads):
        now = Memories(memory.key[piece.documents], memory.value[piece.documents])
        saved.append(Memories(now.key.clone(), now.value.clone()))
        enters = piece.entering(pair)
        inputs = stages.arrange(operands, layout=piece.layout, rule=rule)
        endings.append(_forward_piece(inputs, saved[-1], enters, now, y))
        del inputs  # before the next piece's, so that they take the same memory
    last = Memories(
        carry.last_starts(memory.key, [key for key, _ in endings]),
        carry.last_starts(memory.value, [value for _, value in endings]),
    )
    whole = Memories(torch.cat([x.key for x in saved]), torch.cat([x.value for x in saved]))
    return y, _unranked(layout, memory), _unranked(layout, last), whole


def read(
    operands: Operands,
    initial: Memories,
    stale: Memories | None,
    *,
    chunk_size: int,
    rule: Rule,
    last: bool = True,
) -> tuple[Tensor, Memories]:
    """Output [B, T, H, V] and final memories of rows of whole chunks; nothing is kept for a backward pass.

    Args:
        operands, initial, rule: as in ``forward``; T a multiple of ``chunk_size``.
        stale: what the inner gradients of the first chunk are taken at; None takes ``initial``.
        chunk_size: C, or all tokens of a part of a chunk (kernels.parts).
        last: whether the final memories are wanted; else they mean nothing.
    """
    y = operands.v.new_empty(operands.v.shape)
    memory = Memories(initial.key.new_empty(initial.key.shape), initial.value.new_empty(initial.value.shape))
    batch, length, heads = operands.v.shape[:3]
    layout, steps = PackedLayout.uniform(batch, length, chunk_size), length // chunk_size
    for piece in _pieces(layout.to(operands.v.device), heads):
        source = memory if piece.layout.first_step else initial
        goes_on = last or piece.layout.first_step + len(piece.layout.steps) < steps
        inputs = stages.arrange(operands, layout=piece.layout, rule=rule)
        states, final = stages.scan_forward(
            inputs,
            Memories(source.key[piece.documents], source.value[piece.documents]),
            stale=piece.entering(stale),
            last=goes_on,
        )
        piece.layout.write_tokens(y, stages.readout_forward(inputs, states))
        if goes_on:
            memory.key[piece.documents], memory.value[piece.documents] = final.key, final.value
        del inputs, states  # before the next piece's, so that they take the same memory
    return y, memory


def backward(
    operands: Operands,
    saved: Memories,
    stale: Memories | None,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, Tensor | None],
    dstart: tuple[Tensor | None, Tensor | None],
    *,
    layout: PackedLayout,
    rule: Rule,
) -> tuple[Operands, Memories, Memories | None]:
    """Gradients of the operands, the initial memories and the stale pair (None without one).

    Args:
        operands, stale, layout, rule: as in ``forward``.
        saved: what ``forward`` saved.
        dy: gradient of y; None is zero.
        dfinal, dstart: gradients of the final memories and of the final chunk-start pair; None is zero.
    """
    pair = None if stale is None else _ranked(layout, stale)
    finals, starts = (
        [None if x is None else layout.rank_documents(x) for x in pairs] for pairs in (dfinal, dstart)
    )
    adjoint = Memories(
        carry.adjoint_of_last(layout, finals[0], starts[0], saved.key),
        carry.adjoint_of_last(layout, finals[1], starts[1], saved.value),
    )
    totals = _Totals(operands)
    dpair = None if pair is None else Memories(torch.empty_like(pair.key), torch.empty_like(pair.value))
    end = saved.key.shape[0]
    for piece in reversed(list(_pieces(layout, operands.q.shape[2]))):
        begin = end - piece.running
        first, end = Memories(saved.key[begin:end], saved.value[begin:end]), begin
        inputs = stages.arrange(operands, layout=piece.layout, rule=rule)
        now = Memories(adjoint.key[piece.documents], adjoint.value[piece.documents])
        outside = _outside(inputs, starts)
        grads, dstale = _backward_piece(inputs, first, piece.entering(pair), dy, now, outside)
        totals.add(piece.layout, grads)
        if dpair is not None and dstale is not None:
            dpair.key[piece.documents], dpair.value[piece.documents] = dstale.key, dstale.value
        del inputs, grads, dstale  # before the next piece's, so that they take the same memory
    ranked = None if dpair is None else _unranked(layout, dpair)
    return totals.grads(), _unranked(layout, adjoint), ranked


def _forward_piece(
    inputs: stages.Inputs, first: Memories, stale: Memories | None, last: Memories, y: Tensor
) -> tuple[_Ending, _Ending]:
    """Outputs into ``y`` and memories after the piece into ``last``; what its documents leave behind."""
    states, final = stages.scan_forward(inputs, first, stale=stale)
    inputs.layout.write_tokens(y, stages.readout_forward(inputs, states))
    last.key.copy_(final.key)
    last.value.copy_(final.value)
    return _endings(inputs, states)


def _backward_piece(
    inputs: stages.Inputs,
    first: Memories,
    stale: Memories | None,
    dy: Tensor | None,
    adjoint: Memories,
    outside: tuple[Tensor | None, Tensor | None],
) -> tuple[Operands, Memories | None]:
    """Gradients of the piece's operands and of the stale pair; ``adjoint`` goes from its end to its start."""
    states = stages.rescan(inputs, first, stale=stale)
    x = inputs.value.x
    chunks = torch.zeros_like(x) if dy is None else stages.from_tokens(inputs, dy)
    grads = stages.readout_backward(inputs, states, chunks)
    scan = stages.scan_backward(inputs, states, grads, (adjoint.key, adjoint.value), outside=outside)
    adjoint.key.copy_(scan.initial.key)
    adjoint.value.copy_(scan.initial.value)
    return stages.input_backward(inputs, states, grads, scan), scan.stale


def saved_count(shape: Sequence[int], chunk_size: int, *, offset: int, device: torch.device) -> int:
    """G for rows of equal length: number of memories that forward saves, from B, T, H (symbolic or not)."""
    batch, length, heads = shape
    size = _PieceSize.of(heads, chunk_size, device)
    steps = (offset + length + chunk_size - 1) // chunk_size
    if batch <= size.documents:
        return size.saved(batch, steps)
    rest = batch % size.documents
    count = batch // size.documents * size.saved(size.documents, steps)
    return count + size.saved(rest, steps) if rest > 0 else count


@dataclass(frozen=True)
class _Piece:
    """A span of a band of the layout."""

    layout: PackedLayout

    @property
    def running(self) -> int:
        """How many documents run in its first step."""
        return self.layout.steps[0][1]

    @property
    def documents(self) -> slice:
        """Those documents, by rank."""
        return slice(self.layout.first_rank, self.layout.first_rank + self.running)

    def entering(self, pair: Memories | None) -> Memories | None:
        """Their part of a stale pair by rank, where the piece is the first of its band."""
        if pair is None or self.layout.first_step > 0:
            return None
        return Memories(pair.key[self.documents], pair.value[self.documents])


def _pieces(layout: PackedLayout, heads: int) -> Iterator[_Piece]:
    size = _PieceSize.of(heads, layout.chunk_size, layout.last_chunk.device)
    for band in layout.bands(size.documents):
        for span in band.spans(size.chunks, steps=size.steps):
            yield _Piece(span)


@dataclass(frozen=True)
class _PieceSize:
    """Least number of chunks and of scan steps in a piece, most documents in it."""

    chunks: int
    steps: int
    documents: int

    @staticmethod
    def of(heads: int, chunk_size: int, device: torch.device) -> _PieceSize:
        matrices, tokens = (MATRICES, TOKENS) if device.type == "cpu" else (4096, 1024)
        chunks = -(-matrices // heads)
        return _PieceSize(chunks, -(-tokens // chunk_size), chunks)

    def saved(self, documents: int, steps: int) -> int:
        """Memories that a band of ``documents`` of equal length saves."""
        span = torch.sym_max(self.steps, (self.chunks + documents - 1) // documents)
        count: int = (steps + span - 1) // span * documents
        return count


class _Totals:
    """Gradients of the operands: tokens are written piece by piece, the affine is summed."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._tokens = [None if x is None else x.new_empty(x.shape) for x in operands[:8]]
        self._affine: list[Tensor | None] = [None, None]

    def add(self, piece: PackedLayout, grads: Operands) -> None:
        for whole, part in zip(self._tokens, grads[:8], strict=True):
            if whole is not None and part is not None:
                piece.write_tokens(whole if whole.dim() == 4 else whole[..., None], part)
        for i, part in enumerate(grads[8:]):
            before = self._affine[i]
            self._affine[i] = part if before is None or part is None else before + part

    def grads(self) -> Operands:
        """In the operands' shapes and dtypes."""
        affine = (
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in zip(self._affine, self._operands[8:], strict=True)
        )
        return Operands(*self._tokens, *affine)  # type: ignore[arg-type]


def _endings(inputs: stages.Inputs, states: stages.States) -> tuple[_Ending, _Ending]:
    """What documents that end inside a chunk of these inputs leave behind."""
    return (
        carry.ending_starts(inputs.layout, states.key.stale, _totals(inputs, inputs.key)),
        carry.ending_starts(inputs.layout, states.value.stale, _totals(inputs, inputs.value)),
    )


def _outside(inputs: stages.Inputs, starts: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    layout, chunks = inputs.layout, inputs.alpha.shape[0]
    return (
        carry.outside_adjoint(layout, starts[0], _totals(inputs, inputs.key), chunks),
        carry.outside_adjoint(layout, starts[1], _totals(inputs, inputs.value), chunks),
    )


def _totals(inputs: stages.Inputs, own: stages.Pass) -> Tensor | None:
    return own.gates.total if inputs.rule.corrected else None


def _ranked(layout: PackedLayout, memories: Memories) -> Memories:
    return Memories(layout.rank_documents(memories.key), layout.rank_documents(memories.value))


def _unranked(layout: PackedLayout, memories: Memories) -> Memories:
    return Memories(layout.unrank_documents(memories.key), layout.unrank_documents(memories.value))
