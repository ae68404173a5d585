"""Packing: which tokens make row i of T positions.

"concat" without alignment is arithmetic: the documents, end to end over the shards of a source, form one
stream that is cut into rows of T + 1 tokens overlapping by one. Every other packing is a table of pieces per
shard (rows.py keeps it in a file). A piece of p positions from token a has the inputs tokens[a : a + p] and
the labels tokens[a + 1 : a + p + 1], so a document of L stored tokens (BOS to EOS) has L - 1 positions.
Either way every token but BOS is predicted exactly once, and what is a label follows from where documents
begin, never from the ids: a vocabulary may have one id for BOS and EOS, and documents may hold it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.shard import Shard

__all__ = ["IGNORED", "Packing", "PieceTable", "Stream", "StreamRows", "TableRows", "num_rows", "pack"]

IGNORED = -100
Packing = Literal["concat", "best_fit", "per_document"]


def num_rows(tokens: int, sequence_length: int) -> int:
    """Rows of `sequence_length` labels that hold every token of a stream but the first."""
    return -(-max(0, tokens - 1) // sequence_length)


class Stream:
    """The documents of several shards as one sequence of tokens."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Opened shards, in order."""
        self.shards = shards
        self.offsets: list[int] = np.cumsum([0] + [len(shard.tokens) for shard in shards]).tolist()

    def __len__(self) -> int:
        return self.offsets[-1]

    @property
    def document_starts(self) -> np.ndarray:
        """int64 [documents + 1], where each document begins, and the end of the stream; made in memory."""
        starts = [shard.starts[:-1] + offset for shard, offset in zip(self.shards, self.offsets)]
        return np.concatenate([*starts, self.offsets[-1:]]).astype(np.int64)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64; the part beyond the stream's end is missing."""
        parts = [part.astype(np.int64) for part in self.parts(start, stop)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def parts(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens [start, stop) as views of the shards they lie in."""
        return [shard.tokens[low:high] for shard, low, high, _ in self._cut(start, stop)]

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """int64 [n], the positions in [start, stop) where documents begin; rising, empty documents repeat."""
        found = [s.starts_between(low, high) + offset for s, low, high, offset in self._cut(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])

    def _cut(self, start: int, stop: int) -> list[tuple[Shard, int, int, int]]:
        """(shard, first, last, offset) of every shard with tokens in [start, stop)."""
        first = bisect_right(self.offsets, start) - 1
        last = bisect_left(self.offsets, stop)
        return [
            (shard, max(0, start - offset), min(stop - offset, len(shard.tokens)), offset)
            for shard, offset in zip(self.shards[first:last], self.offsets[first:last])
        ]


class StreamRows:
    """The rows of "concat": slices of the stream of one source.

    Attributes:
        num_rows: rows of the source.
    """

    def __init__(self, shards: Sequence[Shard], *, sequence_length: int, fill: int) -> None:
        """The shards of a source, in order; the last row is filled up with `fill`."""
        self._stream, self._width, self._fill = Stream(shards), sequence_length, fill
        self.num_rows = num_rows(len(self._stream), sequence_length)

    def read(self, row: int, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Write row `row` into tokens and labels, int64 [T] each.

        Returns:
            int64 [n], rising from 0: positions where a document, or the rest of one, begins.
        """
        width = self._width
        start = row * width
        position = 0
        for part in self._stream.parts(start, start + width + 1):
            after = position + len(part)
            tokens[position:after] = part[: width - position]
            labels[max(0, position - 1) : after - 1] = part if position else part[1:]
            position = after
        tokens[position:], labels[max(0, position - 1) :] = self._fill, IGNORED
        starts = self._stream.starts_between(start + 1, start + width + 1) - start
        labels[starts - 1] = IGNORED
        inside = starts[starts < width]
        return np.concatenate([[0], inside[:1], inside[1:][inside[1:] > inside[:-1]]])

    def carried(self, row: int, rows: int) -> int:
        """Tokens of row `row`'s first document that lie in the `rows` rows before it."""
        start = row * self._width
        begin = max(0, start - rows * self._width)
        found = self._stream.starts_between(begin, start + 1)
        return start - int(found[-1]) if len(found) else start - begin


@dataclass(frozen=True)
class PieceTable:
    """The rows of one shard as pieces of its documents, R rows and P pieces.

    Attributes:
        first: int64 [R + 1], the first piece of each row, and P.
        starts: int64 [P], the token of the shard at which a piece begins.
        positions: int32 [P], how many positions it fills.
        cut: documents in more than one piece.
    """

    first: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    cut: int

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.first) - 1


class TableRows:
    """The rows of one source that tables of pieces describe, shard after shard.

    Each piece begins at a multiple of `align`. Up to the next multiple its segment goes on with `fill`; what
    is left of the row is a segment of its own. So every segment begins at a multiple.

    Attributes:
        num_rows: rows of the source.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tables: Sequence[PieceTable],
        *,
        sequence_length: int,
        align: int,
        fill: int,
    ) -> None:
        """The shards of a source, in order, and the table of each."""
        self._tokens = [shard.tokens for shard in shards]
        self._tables, self._align, self._fill = tables, align, fill
        self._first: list[int] = np.cumsum([0] + [table.num_rows for table in tables]).tolist()
        self.num_rows = self._first[-1]
        self._range = np.arange(sequence_length)

    def read(self, row: int, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Write row `row` into tokens and labels, int64 [T] each.

        Returns:
            int64 [n], rising from 0: where its pieces begin, and the fill at its end.
        """
        index = bisect_right(self._first, row) - 1
        table, source = self._tables[index], self._tokens[index]
        here = row - self._first[index]
        low, high = table.first[here : here + 2].tolist()
        starts, positions = table.starts[low:high], table.positions[low:high]
        room = -(-positions // self._align) * self._align  # [n], positions with those up to the next piece
        ends = np.cumsum(room, dtype=np.int64)
        places, used = ends - room, int(ends[-1])
        if high - low == 1:
            begin, count = int(starts[0]), int(positions[0])
            tokens[:count], labels[:count] = (
                source[begin : begin + count],
                source[begin + 1 : begin + count + 1],
            )
        else:
            # Token of each position; in a gap it is one beyond the piece, and is replaced below.
            wanted = np.repeat(starts - places, room)
            wanted += self._range[:used]
            tokens[:used] = source.take(wanted, mode="clip")
            labels[: used - 1] = tokens[1:used]
            labels[places + positions - 1] = source[starts + positions]
        if self._align > 1:
            self._fill_gaps(tokens, labels, positions, room)
        tokens[used:], labels[used:] = self._fill, IGNORED
        return np.append(places, used) if used < len(tokens) else places

    def carried(self, row: int, rows: int) -> int:
        """Tokens of row `row`'s first document that lie in the `rows` rows before it.

        A document that goes on in the next row fills its own to the end. So the row before holds its only
        piece there, or the last of several.
        """
        index = bisect_right(self._first, row) - 1
        table, here, total = self._tables[index], row - self._first[index], 0
        for place in range(here, max(0, here - rows), -1):
            first = int(table.first[place])
            before, filled = int(table.starts[first - 1]), int(table.positions[first - 1])
            if before + filled != table.starts[first]:
                break
            total += filled
            if int(table.first[place - 1]) != first - 1:
                break
        return total

    def _fill_gaps(
        self, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, room: np.ndarray
    ) -> None:
        kinds = np.tile([False, True], len(room))
        gaps = np.repeat(kinds, np.stack([positions, room - positions], axis=1).ravel()).nonzero()[0]
        tokens[gaps], labels[gaps] = self._fill, IGNORED


def pack(document_starts: np.ndarray, *, packing: Packing, sequence_length: int, align: int) -> PieceTable:
    """Cut and place the documents of one shard.

    Args:
        document_starts: int64 [documents + 1], first token of each, and the number of tokens.
        packing: "concat" places pieces in order and cuts them at row ends, "best_fit" is best-fit-decreasing,
            "per_document" starts a row with each piece; both cut only documents longer than a row.
        sequence_length: T, positions per row.
        align: pieces begin at multiples of it in their row; it divides T.
    """
    starts, lengths = document_starts[:-1], np.diff(document_starts) - 1
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    if packing == "concat":
        return _concatenated(starts, lengths, sequence_length, align)
    counts = -(-lengths // sequence_length)
    before = _nth(counts) * sequence_length
    starts = np.repeat(starts, counts) + before
    positions = np.minimum(np.repeat(lengths, counts) - before, sequence_length).astype(np.int32)
    cut = int((counts > 1).sum())
    if packing == "per_document":
        return PieceTable(np.arange(len(starts) + 1), starts, positions, cut)
    rows, slots = best_fit(-(-positions // align), sequence_length // align)
    return _table(_in_corpus_order(rows, slots, starts), slots, starts, positions, cut)


def _concatenated(starts: np.ndarray, lengths: np.ndarray, width: int, align: int) -> PieceTable:
    room = -(-lengths // align) * align
    begins = np.cumsum(room) - room  # in the stream of positions that rows cut
    counts = (begins + lengths - 1) // width - begins // width + 1
    rows = np.repeat(begins // width, counts) + _nth(counts)
    begins, lengths, starts = (np.repeat(values, counts) for values in (begins, lengths, starts))
    first, stop = np.maximum(begins, rows * width), np.minimum(begins + lengths, (rows + 1) * width)
    found = np.searchsorted(rows, np.arange(rows[-1] + 2 if len(rows) else 1))
    table = found, starts + first - begins, (stop - first).astype(np.int32)
    return PieceTable(*table, cut=int((counts > 1).sum()))


def _nth(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., c - 1 for each c of counts, joined."""
    found: np.ndarray = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def _in_corpus_order(rows: np.ndarray, slots: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Number the rows by their largest pieces' places in the shard: the first rows are then any rows."""
    largest = slots == 0
    leaders = np.empty(int(largest.sum()), np.int64)
    leaders[rows[largest]] = starts[largest]
    rank = np.empty(len(leaders), np.int32)
    rank[np.argsort(leaders)] = np.arange(len(leaders))
    numbered: np.ndarray = rank[rows]
    return numbered


def _table(
    rows: np.ndarray, slots: np.ndarray, starts: np.ndarray, positions: np.ndarray, cut: int
) -> PieceTable:
    """Pieces, each with its row and its place among the row's pieces, in row order."""
    first = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    places = first[rows] + slots
    begin, count = np.empty(len(rows), np.int64), np.empty(len(rows), np.int32)
    begin[places], count[places] = starts, positions
    return PieceTable(first, begin, count, cut)


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing: the largest piece first, each in the fullest row that still has room for it.

    Works on runs of equal sizes and rows of equal room, not on single pieces: a row with room c takes c // s
    pieces of size s at once, since after the first it is the fullest that has room.

    Args:
        sizes: integers [n] in [1, capacity].

    Returns:
        rows: int32 [n], row of each piece, numbered as they are opened.
        slots: int32 [n], its place among the pieces of its row, the largest first.
    """
    small = np.uint16 if capacity < 2**16 else np.int32  # 16 bits are sorted by radix
    order = np.argsort((capacity - sizes).astype(small), kind="stable")
    placed, slots = np.empty((2, len(sizes)), np.int32)
    bins = _Bins(capacity)
    held = np.zeros(len(sizes), np.int32)  # pieces in each row; rows are at most as many as pieces
    counts, at = np.bincount(sizes), 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        stop = at + int(counts[size])
        while at < stop:
            rows, each = bins.take(size, stop - at)
            after = at + len(rows) * each
            placed[at:after].reshape(-1, each)[:] = rows[:, None]
            np.add(
                held[rows][:, None], np.arange(each), out=slots[at:after].reshape(-1, each), casting="unsafe"
            )
            held[rows] += each
            at = after
    found = np.empty((2, len(sizes)), np.int32)
    found[0, order], found[1, order] = placed, slots
    return found[0], found[1]


class _Bins:
    """Rows by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._opened = capacity, 0
        self._rooms: list[int] = []  # rising; only those with rows
        self._rows: dict[int, list[np.ndarray]] = {}

    def take(self, size: int, pieces: int) -> tuple[np.ndarray, int]:
        """Give room to at most `pieces` > 0 pieces: the rows, and how many pieces each of them takes."""
        place = bisect_left(self._rooms, size)
        room = self._rooms[place] if place < len(self._rooms) else self._capacity
        each = min(room // size, pieces)
        wanted = pieces // each
        if place < len(self._rooms):
            rows = self._pop(place, room, wanted)
        else:
            rows = np.arange(self._opened, self._opened + wanted, dtype=np.int32)
            self._opened += wanted
        self._put(room - each * size, rows)
        return rows, each

    def _pop(self, place: int, room: int, wanted: int) -> np.ndarray:
        """At most `wanted` rows that have `room`."""
        stack = self._rows[room]
        rows = stack.pop()
        if len(rows) > wanted:
            stack.append(rows[wanted:])
        if not stack:
            del self._rows[room], self._rooms[place]
        return rows[:wanted]

    def _put(self, room: int, rows: np.ndarray) -> None:
        if not room:
            return
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = []
        self._rows[room].append(rows)
