"""The data of a parity run: drawn from the step's number alone, so that every rank can make all of it.

Labels are unequal: each row masks another number of tokens and the last row of a batch keeps five, so a mean
over replicas, micro-batches or segments instead of over tokens shows at once.
"""

from __future__ import annotations

import torch

from data_pipeline.loader import Batch
from trellis_dist.models.loss import IGNORED_LABEL

__all__ = ["global_batch", "micro_batches"]

_KEPT_IN_THE_LAST_ROW = 5
# Where documents start, by row: multiples of the chunk size. With 2 and 4 segments (boundaries at 16, 32, 48)
# some documents cross ranks, some start at a boundary, some lie inside one segment.
_STARTS = ((0, 8, 24), (0,), (0, 40), (0, 16, 48, 56), (0, 32))


def global_batch(step: int, *, rows: int, length: int, vocab_size: int, packed: bool) -> Batch:
    """Batch of ``step``: tokens and labels [rows, length], documents at chunk multiples where ``packed``."""
    generator = torch.Generator().manual_seed(1000 + step)
    stream = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].clone()
    for row in range(rows):
        labels[row, : 7 * row % 41] = IGNORED_LABEL
    labels[-1, _KEPT_IN_THE_LAST_ROW:] = IGNORED_LABEL
    labels[-1, :_KEPT_IN_THE_LAST_ROW] = stream[-1, 1 : _KEPT_IN_THE_LAST_ROW + 1]
    return _batch(tokens, labels, first_row=0, packed=packed)


def micro_batches(batch: Batch, *, dp: int, dp_rank: int, accumulation: int, packed: bool) -> list[Batch]:
    """The rows of replica ``dp_rank`` of ``dp``, in order, as ``accumulation`` equal micro-batches."""
    rows, parts = len(batch.tokens), dp * accumulation
    assert rows % parts == 0, f"{rows} rows do not divide over {dp} replicas x {accumulation} micro-batches"
    size = rows // parts
    firsts = range(dp_rank * accumulation * size, (dp_rank + 1) * accumulation * size, size)
    return [
        _batch(batch.tokens[i : i + size], batch.labels[i : i + size], first_row=i, packed=packed)
        for i in firsts
    ]


def _batch(tokens: torch.Tensor, labels: torch.Tensor, *, first_row: int, packed: bool) -> Batch:
    """Consecutive rows of a global batch with their documents; ``first_row`` is their place in it."""
    bounds = [
        row * tokens.shape[1] + start
        for row in range(len(tokens))
        for start in (_STARTS[(first_row + row) % len(_STARTS)] if packed else (0,))
    ]
    return Batch(
        tokens=tokens,
        labels=labels,
        cu_seqlens=torch.tensor([*bounds, tokens.numel()], dtype=torch.int32),
        valid_tokens=int((labels != IGNORED_LABEL).sum()),
    )
