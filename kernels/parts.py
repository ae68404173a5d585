"""Rows read without a backward pass, so that no slot of the chunk grid is empty.

A call may enter and leave its rows inside a chunk: the end of a prompt, the words of an answer. In a grid of
chunks of C slots each of them would take the time of C tokens. What lies inside one chunk is read by itself
here, in a chunk of exactly its tokens: the same function, because a chunk that is cut keeps the memories at
which its inner gradients are taken,

    S' of the next part = S'                         update "stale"
                        = e^{l_n} S'                 update "corrected", l_n the part's cumulative log decay

and those at the chunk's start where nothing of it was read before. Rows that enter at one offset are cut
where their chunks begin. Of rows that enter at several, or have pads in front of their tokens, those that
stay inside their chunk are read together, the pads silent (log beta = gamma = 0); the others are packed.

Shapes as in ``kernels.compress``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels import chunkwise
from kernels.compress import Call, run_call, stale_pair
from kernels.layout import PackedLayout
from kernels.types import Memories, Operands, Rule

__all__ = ["read_parts"]


_Read = tuple[Tensor, Memories, Memories]


def read_parts(call: Call, pads: Sequence[int] | None = None, *, last: bool = True) -> _Read:
    """Output [B, T, H, V], final memories and final chunk-start pair; no gradients.

    Args:
        call: without a layout.
        pads: how many tokens at the front of each row are none: what y holds there means nothing.
        last: whether the final memories and pair are wanted; else they mean nothing.
    """
    if pads is None and len(call.offsets) == 1 and call.backend == "chunkwise":
        return _read_even(call, last)
    batch, length = call.operands.q.shape[:2]
    counts = [length - pad for pad in pads or [0] * batch]
    offsets = call.offsets * batch if len(call.offsets) == 1 else call.offsets
    inside, packed = list[int](), list[int]()
    for row, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        if count and call.backend == "chunkwise" and offset + count <= call.chunk_size:
            inside.append(row)
        elif count:
            packed.append(row)
    groups = [(rows, read) for rows, read in ((inside, _read_inside), (packed, _read_packed)) if rows]
    if len(groups) == 1 and len(groups[0][0]) == batch:
        rows, read = groups[0]
        return read(_rows_of(call, offsets, rows), counts, last)
    memory = call.initial
    entered = stale_pair(call.state, memory) or memory
    whole = (
        torch.zeros_like(call.operands.v),
        *((_copy(memory), _copy(entered)) if last else (memory, entered)),
    )
    for rows, read in groups:
        own = _rows_of(call, [offsets[row] for row in rows], rows)
        _put(whole, rows, read(own, [counts[row] for row in rows], last), last)
    return whole


def _read_inside(call: Call, counts: list[int], last: bool) -> _Read:
    """Rows whose tokens, the last ``counts`` of each, lie inside one chunk."""
    length, size, memory = call.operands.q.shape[1], max(counts), call.initial
    ends = call.operands if size == length else _tokens(call.operands, length - size, length)
    operands, stale = _silenced(ends, counts), stale_pair(call.state, memory)
    y, final = chunkwise.read(operands, memory, stale, chunk_size=size, rule=call.rule, last=last)
    entered = memory if stale is None else stale
    if size < length:
        y = torch.cat((y.new_zeros(len(y), length - size, *y.shape[2:]), y), 1)
    return y, final, _decayed(entered, operands, call.rule) if last else entered


def _read_packed(call: Call, counts: list[int], last: bool) -> _Read:
    """Any rows, without their pads end to end."""
    mask = _tokens_of(call.operands, counts)
    layout = PackedLayout.of(tuple(counts), call.chunk_size, offsets=call.offsets)
    operands = call.operands.each_token(lambda x: x[mask].unsqueeze(0))
    y, final, start = run_call(replace(call, operands=operands, layout=layout.to(mask.device)))
    rows = torch.zeros_like(call.operands.v)
    rows[mask] = y[0]
    return rows, final, start


def _rows_of(call: Call, offsets: list[int], rows: list[int]) -> Call:
    """The call on some rows, of which ``offsets`` are given."""
    if len(rows) == len(call.operands.q):
        return replace(call, state=replace(call.state, offset=tuple(offsets)), offsets=offsets)
    index = torch.tensor(rows, device=call.operands.q.device)
    operands = call.operands.each_token(lambda x: x.index_select(0, index))
    state = replace(call.state, offset=0).select_rows(rows)
    return replace(call, operands=operands, state=replace(state, offset=tuple(offsets)), offsets=offsets)


def _put(whole: _Read, rows: list[int], part: _Read, last: bool) -> None:
    """Write the results of some rows to their places."""
    index = torch.tensor(rows, device=whole[0].device)
    whole[0].index_copy_(0, index, part[0])
    if not last:
        return
    for target, source in zip(whole[1:], part[1:], strict=True):
        target.key.index_copy_(0, index, source.key)
        target.value.index_copy_(0, index, source.value)


def _copy(memory: Memories) -> Memories:
    return Memories(memory.key.clone(), memory.value.clone())


def _tokens_of(operands: Operands, counts: list[int]) -> Tensor:
    """Which tokens are none's pads, bool [B, T]."""
    length, device = operands.q.shape[1], operands.q.device
    first = length - torch.tensor(counts, device=device)
    return torch.arange(length, device=device) >= first[:, None]


def _silenced(operands: Operands, counts: list[int]) -> Operands:
    """Pads keep what was before them and write nothing."""
    if min(counts) == operands.q.shape[1]:
        return operands
    pads = ~_tokens_of(operands, counts)[..., None]
    gates = (None if x is None else x.masked_fill(pads, 0) for x in operands[4:8])
    return Operands(*operands[:4], *gates, *operands[8:])  # type: ignore[arg-type, call-arg]


def _read_even(call: Call, last: bool) -> _Read:
    """Rows that enter at one offset."""
    (offset,), length, size, rule = call.offsets, call.operands.q.shape[1], call.chunk_size, call.rule
    memory = call.initial
    stale, outputs = stale_pair(call.state, memory), []
    for begin, end in _cuts(length, offset, size):
        part = call.operands if end - begin == length else _tokens(call.operands, begin, end)
        entered = memory if stale is None else stale
        wanted = last or end < length
        y, memory = chunkwise.read(
            part, memory, stale, chunk_size=min(end - begin, size), rule=rule, last=wanted
        )
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
    return operands.each_token(lambda x: x[:, begin:end])


def _decayed(start: Memories, part: Operands, rule: Rule) -> Memories:
    """The chunk-start pair after a part that does not end its chunk."""
    if not rule.corrected:
        return start
    own = part.log_decay if part.value_log_decay is None else part.value_log_decay
    key, value = (x.to(start.key.dtype).sum(1).exp()[..., None, None] for x in (part.log_decay, own))
    return Memories(start.key * key, start.value * value)
