"""All-to-all (Ulysses): the segments of all heads become whole rows of some heads, and back.

Shapes: R rows of T tokens, cut over sp ranks into segments of L = T/sp; H heads, of which a rank runs the
operation for H/sp; B rows of activations (R, or 1 where documents are packed).

    segment [R, L, H, .]  --exchange-->  whole rows [R, T, H/sp, .]  operation  [R, T, H/sp, .]  --back-->  y

Heads are independent, so a rank computes its heads of the operation as one process would. It sends (sp-1)/sp
of its segment's operands and receives as much: O(T/sp) per layer, where state passing sends two memories
whatever T is. The exchange is a collective and puts the sp ranks in lock-step, layer by layer. Softmax
attention has no small state to pass, so it always works this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import CompressState, PackedLayout, compress_kv
from kernels.checks import check_choices, check_operands, check_state
from kernels.layout import check_chunk_size
from kernels.types import Operands, Rule
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.mixers.attention import causal_attention
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.tape import Tape

__all__ = ["AllToAll", "AllToAllAttention", "AllToAllCompress", "exchange", "whole_memory"]

# Every operand starts at a multiple of this many bytes in the buffer, so that a part of it can be read as any
# dtype.
_ALIGNMENT = 16


def exchange(xs: Sequence[Tensor], mesh: Mesh, *, to_heads: bool, tape: Tape | None = None) -> list[Tensor]:
    """Segments [R, L, H, ...] to whole rows [R, T, H/sp, ...] (``to_heads``), or back; differentiable.

    All ``xs`` travel in one call, as bytes, so dtypes may differ and no bit changes; the backward pass is the
    opposite exchange of the gradients of those that need one. Every sp rank must call it with the same shapes
    and dtypes, in the same order, and run its backward pass: the loss of every rank must depend on a result.
    """
    return list(_Exchange.apply(mesh, to_heads, tape, *xs))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    """(mesh, to_heads, tape, tensors) -> the tensors exchanged."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, to_heads: bool, tape: Tape | None, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.mesh, ctx.to_heads = mesh, to_heads
        ctx.needed = needed = ctx.needs_input_grad[3:]
        ys = _move(xs, mesh, to_heads=to_heads, tape=tape)
        ctx.mark_non_differentiable(*(y for y, need in zip(ys, needed, strict=True) if not need))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        sent = [dy for dy, need in zip(dys, ctx.needed, strict=True) if need]
        got = iter(_move(sent, ctx.mesh, to_heads=not ctx.to_heads))
        return None, None, None, *(next(got) if need else None for need in ctx.needed)


def _move(xs: Sequence[Tensor], mesh: Mesh, *, to_heads: bool, tape: Tape | None = None) -> list[Tensor]:
    parts = [_by_peer(x, mesh.sp, to_heads=to_heads) for x in xs]

    def communicate() -> Tensor:
        buffer = _packed(parts)
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=mesh.sp_group)
        return received

    received = communicate() if tape is None else tape.received(communicate)
    return [_joined(part, to_heads=to_heads) for part in _unpacked(received, like=parts)]


def _by_peer(x: Tensor, sp: int, *, to_heads: bool) -> Tensor:
    """What goes to each rank, [sp, R, L, H/sp, ...]: its heads of this segment, or its segment of these."""
    split = 2 if to_heads else 1
    return x.unflatten(split, (sp, -1)).movedim(split, 0)  # type: ignore[no-any-return]


def _joined(received: Tensor, *, to_heads: bool) -> Tensor:
    """[sp, R, L, H/sp, ...] by sender: its segment joins the others along T, or its heads along H."""
    place = 1 if to_heads else 2
    return received.movedim(0, place).flatten(place, place + 1)


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """One row of bytes for each rank, uint8 [sp, bytes]."""
    sizes = [_bytes_per_peer(part) for part in parts]
    buffer = torch.empty(len(parts[0]), sum(sizes), dtype=torch.uint8, device=parts[0].device)
    for place, part in zip(buffer.split(sizes, dim=1), parts, strict=True):
        _as(place, part).copy_(part)
    return buffer


def _unpacked(buffer: Tensor, *, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``_packed``: views of ``buffer``."""
    places = buffer.split([_bytes_per_peer(part) for part in like], dim=1)
    return [_as(place, part) for place, part in zip(places, like, strict=True)]


def _bytes_per_peer(part: Tensor) -> int:
    """Bytes of one rank's share of [sp, ...], the rest of the last _ALIGNMENT included."""
    size = part[0].numel() * part.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _as(place: Tensor, part: Tensor) -> Tensor:
    """Bytes [sp, .] seen in the dtype and shape of ``part`` [sp, ...]."""
    size = part[0].numel() * part.element_size()
    return place[:, :size].view(part.dtype).view(part.shape)


class AllToAll:
    """What both operations share: the mesh, the documents of the batch, and the exchange.

    Attributes:
        tape: set around a forward pass whose activations will be computed again. It keeps what arrived, as
            many bytes as this rank's operands and output have; a replay exchanges nothing.
    """

    def __init__(self, mesh: Mesh, segments: Segments) -> None:
        assert mesh.sp_group is not None, "all-to-all needs a mesh with sp > 1"
        self.mesh = mesh
        self.segments = segments
        self.tape: Tape | None = None

    def _exchange(self, xs: Sequence[Tensor], *, to_heads: bool) -> list[Tensor]:
        return exchange(xs, self.mesh, to_heads=to_heads, tape=self.tape)

    def _whole(self, xs: Sequence[Tensor], rows: int, *, packed: bool) -> list[Tensor]:
        """Activations of this segment ([R, L, H, ...] or packed as [1, R*L, H, ...]) to whole rows of heads.

        ``packed`` says in which of the two forms the whole rows are wanted.
        """
        heads = xs[0].shape[2]
        assert heads % self.mesh.sp == 0, f"{heads} heads do not share out over sp = {self.mesh.sp}"
        by_row = [x.reshape(rows, -1, *x.shape[2:]) for x in xs]
        whole = self._exchange(by_row, to_heads=True)
        return [x.flatten(0, 1).unsqueeze(0) for x in whole] if packed else whole

    def _segment(self, y: Tensor, rows: int, *, like: Tensor) -> Tensor:
        """Whole rows of some heads back to this segment, in the form of ``like`` [B, ., H, ...]."""
        (y,) = self._exchange([y.reshape(rows, -1, *y.shape[2:])], to_heads=False)
        return y.reshape(like.shape)

    def _heads(self, heads: int) -> slice:
        """This rank's share of ``heads``."""
        share = heads // self.mesh.sp
        return slice(self.mesh.sp_rank * share, (self.mesh.sp_rank + 1) * share)


class AllToAllCompress(AllToAll):
    """A mixer's operation, replaced: ``compress_kv`` of the whole rows for this rank's share of the heads.

    Args:
        mesh: its sp_group carries the exchange.
        segments: the documents of the current batch's whole rows.

    Attributes:
        inner: ``compress_kv``, called with whole rows of this rank's heads; what looks into it replaces it.
    """

    def __init__(self, mesh: Mesh, segments: Segments) -> None:
        super().__init__(mesh, segments)
        self.inner: Callable[..., tuple[Tensor, CompressState | None]] = compress_kv

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
    ) -> tuple[Tensor, None]:
        """Outputs y [B, L, H, V] of this segment; arguments as for ``kernels.compress_kv``.

        Per-head parameters come whole and are cut to this rank's heads: the gradient of the other heads is 0
        here, and the sum over sp, once per step, completes it. ``layout`` only says that the segment is
        packed; the documents are those of the whole rows. ``initial_state``, the same on every sp rank, is
        one state expanded to this segment's documents (a learned initial memory) and then starts every
        document of the whole rows; where every row is one document it may also be one state for each row.

        Raises:
            ValueError: an argument that compress_kv refuses, a state that differs between packed documents or
                enters inside a chunk, or ``output_final_state``.
        """
        gates = (log_decay, step_size, value_log_decay, value_step_size)
        operands = Operands(q, k, v, alpha, *gates, readout_weight, readout_bias)
        check_operands(operands, dims="B, T, H", check_values=False)
        check_choices(Rule(phi, readout, update))
        check_chunk_size(chunk_size)
        if initial_state is not None:
            check_state(initial_state, q, v, alpha, len(q) if layout is None else layout.num_documents)
        rows = self.segments.rows(len(q), packed=layout is not None)
        whole = self.segments.whole_rows(rows, q.device)
        own = _whole_layout(whole, chunk_size, output_final_state=output_final_state)
        heads = self._heads(q.shape[2])
        if initial_state is not None:
            initial_state = _whole_state(initial_state, rows, whole, heads)
        y, _ = self.inner(
            **self._whole_operands(operands, rows, packed=whole.packed),
            chunk_size=chunk_size,
            phi=phi,
            readout=readout,
            update=update,
            readout_weight=None if readout_weight is None else readout_weight[heads],
            readout_bias=None if readout_bias is None else readout_bias[heads],
            initial_state=initial_state,
            layout=own,
            check_values=False,
        )
        return self._segment(y, rows, like=v), None

    def _whole_operands(self, operands: Operands, rows: int, *, packed: bool) -> dict[str, Any]:
        """Whole rows of this rank's heads of what every token has, in one exchange."""
        named = zip(Operands._fields[:8], operands[:8], strict=True)
        present = {name: x for name, x in named if x is not None}
        return dict(zip(present, self._whole(list(present.values()), rows, packed=packed), strict=True))


class AllToAllAttention(AllToAll):
    """An attention mixer's operation, replaced: ``causal_attention`` of whole rows for a share of the heads.

    Args:
        mesh: its sp_group carries the exchange.
        segments: the documents of the current batch's whole rows.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        theta: float,
        window: int | None = None,
        positions: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """[B, L, H, D] three times -> the same; arguments as for ``causal_attention``.

        ``lengths`` only says that the segment is packed, and ``positions``, which count from the segment's
        start, are not used: the whole rows have their own.
        """
        rows = self.segments.rows(len(q), packed=lengths is not None)
        whole = self.segments.whole_rows(rows, q.device)
        y = causal_attention(
            *self._whole([q, k, v], rows, packed=whole.packed),
            theta=theta,
            window=window,
            positions=whole.positions,
            lengths=whole.lengths,
        )
        return self._segment(y, rows, like=v)


def _whole_layout(
    whole: SequenceContext, chunk_size: int, *, output_final_state: bool
) -> PackedLayout | None:
    """The grid of the call's chunk size, of the whole rows."""
    sizes = [layout.chunk_size for layout in whole.layouts]
    if whole.packed and chunk_size not in sizes:
        raise ValueError(
            f"the batch was cut for chunk size {', '.join(map(str, sizes))}, the call has {chunk_size}: use "
            "the same"
        )
    if output_final_state:
        raise ValueError(
            "output_final_state with all-to-all: a rank holds the state of its heads only; use "
            'sequence.mode = "state_passing" or mesh.sp = 1'
        )
    return whole.layout(chunk_size)


def _whole_state(state: CompressState, rows: int, whole: SequenceContext, heads: slice) -> CompressState:
    """The state before each document of the whole rows, for this rank's heads."""
    if state.inside_chunk:
        raise ValueError(
            f"initial_state has offset {state.offset}: with mesh.sp > 1 a state enters between chunks"
        )
    documents = rows if whole.lengths is None else len(whole.lengths)
    key, value = (whole_memory(x, rows, documents) for x in (state.key_memory, state.value_memory))
    return CompressState(key_memory=key[:, heads], value_memory=value[:, heads])


def whole_memory(memory: Tensor, rows: int, documents: int) -> Tensor:
    """Memories [., H, M, .] of this segment's documents -> [documents, H, M, .]."""
    # A stride of 0 says that all documents start from one memory; to compare values would wait for a GPU.
    if len(memory) == 1 or memory.stride(0) == 0:
        return memory[:1].expand(documents, *memory.shape[1:])
    if documents > rows:
        raise ValueError(
            f"initial_state holds {len(memory)} memories for the {documents} documents of {rows} whole rows: "
            "with all-to-all expand one memory to all documents, or use state passing"
        )
    return memory
