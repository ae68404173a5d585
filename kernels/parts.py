"""Rows of equal length read in parts, cut where their chunks begin, so that no slot of the grid is empty.

A call may enter and leave its rows inside a chunk: the end of a prompt, the words of an answer. In a grid of
chunks of C slots each of them would take the time of C tokens. What lies inside one chunk is read by itself
here, in a chunk of exactly its tokens: the same function, because a chunk that is cut keeps the memories at
which its inner gradients are taken,

    S' of the next part = S'                         update "stale"
                        = e^{l_n} S'                 update "corrected", l_n the part's cumulative log decay

and those at the chunk's start where nothing of it was read before. Shapes as in ``kernels.compress``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kernels import chunkwise
from kernels.compress import Call, stale_pair
from kernels.types import Memories, Operands, Rule

__all__ = ["read_parts"]


def read_parts(call: Call) -> tuple[Tensor, Memories, Memories]:
    """Output [B, T, H, V], final memories and final chunk-start pair; no gradients.

    Args:
        call: without a layout, with one offset for all rows.
    """
    (offset,), length, size, rule = call.offsets, call.operands.q.shape[1], call.chunk_size, call.rule
    memory = call.initial
    stale, outputs = stale_pair(call.state, memory), []
    for begin, end in _cuts(length, offset, size):
        part = call.operands if end - begin == length else _tokens(call.operands, begin, end)
        entered = memory if stale is None else stale
        y, memory = chunkwise.read(part, memory, stale, chunk_size=min(end - begin, size), rule=rule)
        outputs.append(y)
        stale = _decayed(entered, part, rule) if (offset + end) % size else None
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return whole, memory, memory if stale is None else stale


def _cuts(length: int, offset: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """The rest of a chunk that was begun, whole chunks, and the beginning of one: those that there are."""
    first = min(-offset % chunk_size, length)
    whole = first + (length - first) // chunk_size * chunk_size
    return pairwise(sorted({0, first, whole, length}))


def _tokens(operands: Operands, begin: int, end: int) -> Operands:
    parts = (None if x is None else x[:, begin:end] for x in operands[:8])
    return Operands(*parts, *operands[8:])  # type: ignore[arg-type, call-arg]


def _decayed(start: Memories, part: Operands, rule: Rule) -> Memories:
    """The chunk-start pair after a part that does not end its chunk."""
    if not rule.corrected:
        return start
    own = part.log_decay if part.value_log_decay is None else part.value_log_decay
    key, value = (x.to(start.key.dtype).sum(1).exp()[..., None, None] for x in (part.log_decay, own))
    return Memories(start.key * key, start.value * value)
