"""The chunk-start pair of a carried state: where it enters a call, where it leaves, and its adjoints.

A document that a call enters inside a chunk takes that chunk's inner gradients at the pair it brings along
("stale" memories S'), not at its running memories S. After the last token, at cumulative decay l_C of the
last chunk, it leaves with

    S' of the next token = S            where the document ended with a chunk
                         = S'           inside a chunk, update "stale"
                         = e^{l_C} S'   inside a chunk, update "corrected"

Shapes: memories [N, H, M, .] by rank of the document (kernels.layout) or [P, H, M, .] by chunk; one memory at
a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import PackedLayout

__all__ = ["adjoint_of_last", "ending_starts", "last_starts", "outside_adjoint", "stale_of_chunks"]


def stale_of_chunks(start: Tensor, pair: Tensor) -> Tensor:
    """Stale memory of every chunk [P, ...]: the one at its start, in first chunks the pair's [N', ...]."""
    return pair if pair.shape[0] == start.shape[0] else torch.cat((pair, start[pair.shape[0] :]))


def ending_starts(layout: PackedLayout, stale: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(rank [E], leaving chunk-start memory [E, ...]) of the documents that end inside a chunk of the layout.

    ``stale`` is by chunk; ``total`` e^{l_C} [P, H, 1, 1], None for the update "stale".
    """
    if layout.ending_rank is None or layout.ending_chunk is None:
        return None
    leaving = stale.index_select(0, layout.ending_chunk)
    if total is not None:
        leaving = leaving * total.index_select(0, layout.ending_chunk)
    return layout.ending_rank, leaving


def last_starts(final: Tensor, endings: list[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Leaving chunk-start memories [N, ...] from the final ones and what ``ending_starts`` found."""
    leaving = final.clone()
    for found in endings:
        if found is not None:
            leaving.index_copy_(0, *found)
    return leaving


def adjoint_of_last(
    layout: PackedLayout, dfinal: Tensor | None, dlast: Tensor | None, like: Tensor
) -> Tensor:
    """Adjoint of the final memories [N, ...]; a leaving chunk-start memory that equals one adds to it."""
    total = like.new_zeros(layout.num_documents, *like.shape[1:])
    if dfinal is not None:
        total += dfinal
    if dlast is not None:
        keep = layout.ends_inside
        total += dlast if keep is None else dlast.masked_fill(keep.view(-1, 1, 1, 1), 0)
    return total


def outside_adjoint(
    layout: PackedLayout, dlast: Tensor | None, total: Tensor | None, chunks: int
) -> Tensor | None:
    """What leaving chunk-start memories add to the adjoint of the stale memories [P, ...]; None for nothing.

    ``dlast`` is by rank [N, ...]; ``total`` as in ``ending_starts``.
    """
    if dlast is None or layout.ending_rank is None or layout.ending_chunk is None:
        return None
    leaving = dlast.index_select(0, layout.ending_rank)
    if total is not None:
        leaving = leaving * total.index_select(0, layout.ending_chunk)
    return dlast.new_zeros(chunks, *dlast.shape[1:]).index_copy_(0, layout.ending_chunk, leaving)
