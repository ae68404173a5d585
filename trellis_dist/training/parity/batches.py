"""The data of a parity run: drawn from the step's number alone, so that every rank can make all of it.

Labels are unequal: each row masks another number of tokens and the last row of a batch keeps five, so a mean
over replicas, micro-batches or segments instead of over tokens shows at once.
"""

from __future__ import annotations

from typing import Literal

import torch

from data_pipeline.loader import Batch
from trellis_dist.models.loss import IGNORED_LABEL

__all__ = ["Documents", "global_batch", "micro_batches"]

Documents = Literal["rows", "packed", "carried"]

_KEPT_IN_THE_LAST_ROW = 5
# Where documents start, by row: multiples of the chunk size. With 2 and 4 segments (boundaries at 16, 32, 48)
# some documents cross ranks, some start at a boundary, some lie inside one segment.
_STARTS = ((0, 8, 24), (0,), (0, 40), (0, 16, 48, 56), (0, 32))
# Where rows carry states: anywhere, so that most begin inside a chunk, and one two tokens after its document.
_ANYWHERE = ((0, 9, 27), (0,), (0, 62), (0, 16, 48, 59), (0, 33))
# Steps after which every row begins a document; of three, the last goes on in the middle of one.
_RUN = 3


def global_batch(step: int, *, rows: int, length: int, vocab_size: int, documents: Documents) -> Batch:
    """Batch of ``step``: tokens and labels [rows, length].

    Args:
        documents: "rows" are documents; "packed" at chunk multiples; "carried" anywhere, and rows go on with
            the last document of the same row of the step before.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    stream = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].clone()
    for row in range(rows):
        labels[row, : 7 * row % 41] = IGNORED_LABEL
    labels[-1, _KEPT_IN_THE_LAST_ROW:] = IGNORED_LABEL
    labels[-1, :_KEPT_IN_THE_LAST_ROW] = stream[-1, 1 : _KEPT_IN_THE_LAST_ROW + 1]
    carried = _carried(step, rows=rows, length=length) if documents == "carried" else None
    return _batch(tokens, labels, first_row=0, documents=documents, carried=carried)


def micro_batches(
    batch: Batch, *, dp: int, dp_rank: int, accumulation: int, documents: Documents
) -> list[Batch]:
    """The rows of replica ``dp_rank`` of ``dp``, in order, as ``accumulation`` equal micro-batches."""
    rows, parts = len(batch.tokens), dp * accumulation
    assert rows % parts == 0, f"{rows} rows do not divide over {dp} replicas x {accumulation} micro-batches"
    size = rows // parts
    firsts = range(dp_rank * accumulation * size, (dp_rank + 1) * accumulation * size, size)
    return [
        _batch(
            batch.tokens[i : i + size],
            batch.labels[i : i + size],
            first_row=i,
            documents=documents,
            carried=None if batch.carried is None else batch.carried[i : i + size],
        )
        for i in firsts
    ]


def _starts(row: int, documents: Documents) -> tuple[int, ...]:
    if documents == "rows":
        return (0,)
    known = _STARTS if documents == "packed" else _ANYWHERE
    return known[row % len(known)]


def _carried(step: int, *, rows: int, length: int) -> torch.Tensor:
    """Tokens of each row's first document that its rows of earlier steps held."""
    lasts = [_starts(row, "carried")[-1] for row in range(rows)]
    before = step % _RUN
    return torch.tensor([min(before, 1) * (length - x) if x else before * length for x in lasts])


def _batch(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    first_row: int,
    documents: Documents,
    carried: torch.Tensor | None,
) -> Batch:
    """Consecutive rows of a global batch with their documents; ``first_row`` is their place in it."""
    bounds = [
        row * tokens.shape[1] + start
        for row in range(len(tokens))
        for start in _starts(first_row + row, documents)
    ]
    return Batch(
        tokens=tokens,
        labels=labels,
        cu_seqlens=torch.tensor([*bounds, tokens.numel()], dtype=torch.int32),
        valid_tokens=int((labels != IGNORED_LABEL).sum()),
        slot=first_row,
        carried=carried,
    )
