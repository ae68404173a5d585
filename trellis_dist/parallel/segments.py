"""Cutting a batch over sp, and what this segment must know of its rows' documents.

Shapes: R rows of T tokens, cut into sp segments of L = T/sp tokens; this rank keeps tokens [sp_rank L, +L) of
every row. A document that began in an earlier segment continues here; a row start always begins one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trellis_dist.models.context import SequenceContext, document_starts, packed_context
from trellis_dist.models.conv import edges_between_tails
from trellis_dist.parallel.mesh import Mesh

__all__ = ["Segments", "row_ends"]


@dataclass(frozen=True)
class _Documents:
    """The documents of the last batch that was cut.

    Attributes:
        before: per row, tokens that the document at this segment's first token has in the segments before.
        inner: row and column of each document that starts inside this segment, past its first token.
        length: L.
        bounds: of the documents that the cut named, in the flattened stream of whole rows [n+1].
        whole: the context of the whole rows on each device that asked for it.
        edges: those of the convolution, by its kernel and device.
    """

    before: tuple[int, ...]
    inner: tuple[tuple[int, int], ...]
    length: int
    bounds: tuple[int, ...]
    whole: dict[torch.device, SequenceContext] = field(default_factory=dict, repr=False, compare=False)
    edges: dict[tuple[int, torch.device], tuple[Tensor, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )


class Segments:
    """Cuts batches for one rank; the model's replaced functions ask it about the batch that was cut last.

    With sp > 1 every batch goes through ``cut`` right before the model's forward pass. Without a cut, and
    after one without ``cu_seqlens``, every row is one document that runs through all segments.
    """

    def __init__(self, mesh: Mesh, *, chunk_size: int, grids: Sequence[int] | None = None) -> None:
        """Segments end with a chunk of every layer.

        Args:
            chunk_size: tokens that segments and documents are multiples of.
            grids: chunk sizes of the layers, which divide it; None: it is the only one.
        """
        self.mesh = mesh
        self._chunk_size = chunk_size
        self._grids = (chunk_size,) if grids is None else tuple(grids)
        self._documents: _Documents | None = None

    def cut(
        self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's segment of a batch; the batch itself when sp = 1.

        Args:
            tokens, labels: [R, T]. Labels are already shifted: the label of a segment's last token is the
                first token of the next segment, which only the whole row knows.
            cu_seqlens: [n+1], document boundaries in the flattened [R*T] stream, or None.

        Returns:
            tokens and labels [R, L], and the documents inside the segment (None when no document starts
            inside it).

        Raises:
            ValueError: T does not divide into segments that are multiples of C, ``cu_seqlens`` does not rise
                from 0 to R*T, or a document does not start at a multiple of C.
        """
        if self.mesh.sp == 1:
            return tokens, labels, cu_seqlens
        length = self._segment_length(tokens.shape[1])
        here = slice(self.mesh.sp_rank * length, (self.mesh.sp_rank + 1) * length)
        self._documents = None
        if cu_seqlens is not None:
            self._documents = self._find_documents(cu_seqlens, tokens.shape[0], tokens.shape[1], length)
        return tokens[:, here], labels[:, here], self._local_bounds(cu_seqlens)

    @property
    def documents(self) -> object:
        """Of the batch that was cut last; setting them goes back to another batch, to compute it again."""
        return self._documents

    @documents.setter
    def documents(self, documents: object) -> None:
        assert documents is None or isinstance(documents, _Documents), "documents come from another moment"
        self._documents = documents

    def rows(self, batch: int, *, packed: bool) -> int:
        """R, the rows behind activations of ``batch`` rows (1 when ``packed``).

        Raises:
            ValueError: packed documents that did not come from ``cut``.
        """
        if not packed:
            return batch
        if self._documents is None:
            raise ValueError(
                "packed documents reached a model split over the sequence without being cut: pass the whole "
                "rows and their cu_seqlens through Segments.cut before the forward pass"
            )
        return len(self._documents.before)

    def continues(self, rows: int) -> tuple[bool, ...]:
        """Per row, whether this segment continues a document of the segment before."""
        return tuple(before > 0 for before in self.before(rows, at_most=1))

    def before(self, rows: int, *, at_most: int) -> tuple[int, ...]:
        """Per row, how many of the ``at_most`` tokens before this segment belong to its first document."""
        if self.mesh.left is None:
            return (0,) * rows
        if self._documents is None:
            return (at_most,) * rows
        before = self._documents.before
        assert len(before) == rows, "the batch in the model is not the one that was cut last"
        return tuple(min(tokens, at_most) for tokens in before)

    def edges(self, kernel: int, device: torch.device) -> tuple[Tensor, ...]:
        """``conv.edges_between_tails`` of the documents, the halo of each row being its tail.

        Made when first asked for, so that layers share them: the copy to the device waits for it.
        """
        assert self._documents is not None, "edges are asked for packed documents only"
        known = self._documents.edges
        if (kernel, device) not in known:
            known[kernel, device] = self._find_edges(self._documents, kernel, device)
        return known[kernel, device]

    def _find_edges(self, documents: _Documents, kernel: int, device: torch.device) -> tuple[Tensor, ...]:
        rows, length = len(documents.before), documents.length
        starts = [row * length + column for row, column in documents.inner]
        placed = torch.tensor(starts, dtype=torch.int64, device=device)
        return edges_between_tails(placed, rows=rows, length=length, kernel=kernel)

    def whole_rows(self, rows: int, device: torch.device) -> SequenceContext:
        """The documents of the whole rows, for a layer that is given them all; tables on ``device``.

        Where the cut named documents the whole rows are packed, [1, R*T, .], on every rank alike: also on
        one whose own segment holds no document start and is not packed. Built when first asked for, so that
        layers share it and state passing does not pay for it.
        """
        if self._documents is None:
            return SequenceContext()
        assert len(self._documents.before) == rows, "the batch in the model is not the one that was cut last"
        if device not in self._documents.whole:
            self._documents.whole[device] = self._whole_context(self._documents, device)
        return self._documents.whole[device]

    def _whole_context(self, documents: _Documents, device: torch.device) -> SequenceContext:
        context = packed_context(
            torch.tensor(documents.bounds, device="cpu"),
            rows=len(documents.before),
            length=documents.length * self.mesh.sp,
            chunk_sizes=self._grids,
            conv_kernel=0,  # the convolution never sees the whole rows: it fetches its halo
        )
        assert context.positions is not None, "a packed context has positions"
        layouts = tuple(layout.to(device) for layout in context.layouts)
        return replace(context, layouts=layouts, positions=context.positions.to(device))

    def _segment_length(self, total: int) -> int:
        whole = self.mesh.sp * self._chunk_size
        if total % whole:
            raise ValueError(
                f"rows of {total} tokens do not cut into mesh.sp = {self.mesh.sp} segments that are "
                f"multiples of the chunk size {self._chunk_size}: use a multiple of {whole} tokens"
            )
        return total // self.mesh.sp

    def _find_documents(self, cu_seqlens: Tensor, rows: int, total: int, length: int) -> _Documents:
        found: list[int] = document_starts(cu_seqlens, rows=rows, length=total).tolist()
        starts = [divmod(start, total) for start in found]
        for row, column in starts:
            if column % self._chunk_size:
                raise ValueError(
                    f"a document starts at token {column} of row {row}, no multiple of the chunk size "
                    f"{self._chunk_size}, so a segment boundary would fall inside a chunk: with mesh.sp = "
                    f"{self.mesh.sp} pack documents at multiples of the chunk size, or set mesh.sp = 1"
                )
        begin = self.mesh.sp_rank * length
        current = [0] * rows  # where each row's document at ``begin`` starts
        for row, column in starts:
            current[row] = max(current[row], column) if column <= begin else current[row]
        return _Documents(
            before=tuple(begin - column for column in current),
            inner=tuple((row, col - begin) for row, col in starts if begin < col < begin + length),
            length=length,
            bounds=(*(row * total + column for row, column in starts), rows * total),
        )

    def _local_bounds(self, cu_seqlens: Tensor | None) -> Tensor | None:
        documents = self._documents
        if cu_seqlens is None or documents is None or not documents.inner:
            return None
        rows = len(documents.before)
        bounds = {row * documents.length for row in range(rows + 1)}
        bounds |= {row * documents.length + column for row, column in documents.inner}
        return torch.tensor(sorted(bounds), dtype=cu_seqlens.dtype, device=cu_seqlens.device)


@functools.lru_cache(maxsize=64)
def row_ends(lengths: tuple[int, ...], rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last document of each row; documents of ``lengths`` tokens fill ``rows`` equal rows."""
    row_length = sum(lengths) // rows
    first, last, position = [], [], 0
    for document, length in enumerate(lengths):
        if position % row_length == 0:
            first.append(document)
        position += length
        if position % row_length == 0:
            last.append(document)
    assert len(first) == len(last) == rows, "a row start is always a document start"
    return tuple(first), tuple(last)
