"""Where documents start in a batch: computed once per forward pass, shared by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import PackedLayout
from trellis_dist.models.carry import CarriedRows, Carry
from trellis_dist.models.conv import document_edges, edges_between_tails

__all__ = ["SequenceContext", "document_starts", "packed_context"]


@dataclass(frozen=True)
class SequenceContext:
    """The documents of one forward pass. The default is: every row is one document.

    When packed, activations are flattened to one row [1, B*T, .] and the fields below are set.

    Attributes:
        layouts: chunk grids of the recurrent layers, one for each chunk size; one grid per document.
        cu_seqlens: int64 [n+1], document boundaries in the flattened stream (row starts included).
        lengths: document lengths in tokens, on the host.
        positions: int64 [B*T], position of each token inside its document.
        edges: per tap 1..conv_kernel-1, the stream indices whose tap reaches into the previous document; with
            ``carried``, of the stream in which each row follows its carried inputs.
        carried: which rows go on from the states of earlier rows; None: every row starts anew.
    """

    layouts: tuple[PackedLayout, ...] = ()
    cu_seqlens: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    positions: Tensor | None = None
    edges: tuple[Tensor, ...] | None = None
    carried: CarriedRows | None = None

    @property
    def packed(self) -> bool:
        """Whether activations are one flattened row of several documents."""
        return self.cu_seqlens is not None

    def layout(self, chunk_size: int) -> PackedLayout | None:
        """The grid of chunks of that size; None where every row is one document."""
        if not self.packed:
            return None
        found = [layout for layout in self.layouts if layout.chunk_size == chunk_size]
        assert found, f"the batch was prepared for chunks of {[x.chunk_size for x in self.layouts]} tokens"
        return found[0]


def packed_context(
    cu_seqlens: Tensor,
    *,
    rows: int,
    length: int,
    chunk_sizes: Sequence[int],
    conv_kernel: int,
    carry: Carry | None = None,
) -> SequenceContext:
    """Context of ``rows`` x ``length`` tokens whose documents start at ``cu_seqlens`` and at every row start.

    Args:
        cu_seqlens: int32 or int64 [n+1], non-decreasing from 0 to rows * length over the flattened stream.
        chunk_sizes: C of the layers; each document has its own chunk grids.
        conv_kernel: taps of the short convolution.
        carry: states that rows take over and leave.

    Raises:
        ValueError: ``cu_seqlens`` is no such tensor.
    """
    starts = document_starts(cu_seqlens, rows=rows, length=length)
    total = rows * length
    boundaries = torch.cat([starts, starts.new_tensor([total])])
    lengths = boundaries.diff()
    positions = torch.arange(total) - starts.repeat_interleave(lengths)
    device = cu_seqlens.device
    carried = None
    if carry is None:
        edges = document_edges(starts, total=total, kernel=conv_kernel)
    else:
        carried = CarriedRows.of(carry, starts, length=length, conv_kernel=conv_kernel)
        edges = edges_between_tails(starts, rows=rows, length=length, kernel=conv_kernel)
    layouts = []
    for size in chunk_sizes:
        offsets = 0 if carried is None else carried.offsets(len(starts), size)
        layouts.append(PackedLayout.from_cu_seqlens(boundaries, size, offsets=offsets).to(device))
    return SequenceContext(
        layouts=tuple(layouts),
        cu_seqlens=boundaries.to(device),
        lengths=tuple(lengths.tolist()),
        positions=positions.to(device),
        edges=tuple(index.to(device) for index in edges),
        carried=None if carried is None else carried.to(device),
    )


def document_starts(cu_seqlens: Tensor, *, rows: int, length: int) -> Tensor:
    """Sorted int64 starts [n] of the non-empty documents, every row start among them; on the host."""
    total = rows * length
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: pass int32 or int64 [documents + 1]"
        )
    values = cu_seqlens.to(device="cpu", dtype=torch.int64)
    if int(values[0]) != 0 or int(values[-1]) != total or bool((values.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens runs from {int(values[0])} to {int(values[-1])}: it must rise from 0 to {total}, "
            f"the {rows} x {length} tokens of the batch"
        )
    starts: Tensor = torch.unique(torch.cat([values, torch.arange(0, total, length)]))
    return starts[starts < total]
