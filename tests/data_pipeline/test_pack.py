"""What every packing must keep, and best-fit-decreasing against a plain one."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.pack import PieceTable, StreamRows, best_fit, pack
from data_pipeline.shard import Shard
from tests.data_pipeline.written import EOS, documents, write_one

PACKINGS = ("concat", "best_fit", "per_document")
LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(2, 40), st.integers(30, 100)), max_size=60)


def rows_of(table: PieceTable) -> list[list[tuple[int, int]]]:
    """(first token, positions) of the pieces of each row."""
    pieces = list(zip(table.starts.tolist(), table.positions.tolist()))
    return [pieces[a:b] for a, b in zip(table.first[:-1], table.first[1:])]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, packing=st.sampled_from(PACKINGS), align=st.sampled_from([1, 4, 8, 24]))
def test_pieces_cover_every_position_once_and_fit_their_rows(
    lengths: list[int], packing: str, align: int
) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = rows_of(pack(starts, packing=packing, sequence_length=24, align=align))
    covered = sorted(place for row in rows for a, p in row for place in range(a, a + p))
    expected = [place for a, n in zip(starts.tolist(), lengths) for place in range(a, a + n - 1)]
    assert covered == expected
    for row in rows:
        assert row
        assert all(p > 0 for _, p in row)
        assert sum(-(-p // align) * align for _, p in row[:-1]) + row[-1][1] <= 24


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, packing=st.sampled_from(PACKINGS[1:]), align=st.sampled_from([1, 8]))
def test_no_document_is_cut_that_fits_a_row(lengths: list[int], packing: str, align: int) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    table = pack(starts, packing=packing, sequence_length=24, align=align)
    expected = []
    for begin, length in zip(starts.tolist(), lengths):
        cuts = [*range(begin, begin + length - 1, 24), begin + length - 1]
        expected += [(a, b - a) for a, b in pairwise(cuts)]
    assert sorted(zip(table.starts.tolist(), table.positions.tolist())) == expected
    assert table.cut == sum(length - 1 > 24 for length in lengths)
    if packing == "per_document":
        assert [row for [row] in rows_of(table)] == expected


def plain_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """One piece after the other: the sizes in each row."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row in rows if sum(row) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            rows.append([size])
    return rows


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_best_fit_is_best_fit_decreasing(data: st.DataObject, capacity: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    rows, slots = best_fit(np.array(sizes, np.int64), capacity)
    found: dict[int, dict[int, int]] = {}
    for size, row, slot in zip(sizes, rows.tolist(), slots.tolist()):
        assert slot not in found.setdefault(row, {})
        found[row][slot] = size
    ours = [[row[slot] for slot in range(len(row))] for row in found.values()]
    # Equally full rows are equally good: which of them takes a piece is left open.
    assert sorted(map(sum, ours)) == sorted(map(sum, plain_best_fit(sizes, capacity)))
    assert all(row == sorted(row, reverse=True) for row in ours)
    assert sorted(found) == list(range(len(found)))


def test_the_first_rows_of_best_fit_are_not_the_fullest() -> None:
    # Validation may score the first rows only.
    lengths = np.tile([3, 24, 9, 17], 50)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    table = pack(starts, packing="best_fit", sequence_length=24, align=1)
    leaders = table.starts[table.first[:-1]]
    assert (np.diff(leaders) > 0).all()


def test_aligned_concat_cuts_at_row_ends_only() -> None:
    starts = np.cumsum([0, 6, 31, 4])  # 5, 30 and 3 positions
    table = pack(starts, packing="concat", sequence_length=16, align=4)
    # 5 take 8; 8 + 16 + 6 of the second, which take 8; then 3.
    assert rows_of(table) == [[(0, 5), (6, 8)], [(14, 16)], [(30, 6), (37, 3)]]
    assert table.cut == 1


def test_the_rows_of_a_large_shard_are_pinned() -> None:
    # Another version of numpy, or of this code under the same version of the file, must make the same rows: a
    # resumed run would see others.
    draw = (np.arange(20000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(50)
    starts = np.concatenate([[0], np.cumsum(draw % 300 + 2)]).astype(np.int64)
    table = pack(starts, packing="best_fit", sequence_length=512, align=1)
    state = hashlib.sha256()
    for array, dtype in ((table.first, "<i8"), (table.starts, "<i8"), (table.positions, "<i4")):
        state.update(array.astype(dtype).tobytes())
    assert (table.num_rows, table.cut, state.hexdigest()[:16]) == (5855, 0, "474ed067b680765f")


@pytest.mark.parametrize("width", [2, 5, 16, 1000])
def test_stream_rows_cross_shards(tmp_path: Path, width: int) -> None:
    shards = [documents(1, 7), documents(2, 1), documents(3, 9)]
    opened = []
    for number, shard in enumerate(shards):
        write_one(tmp_path, f"train-00{number}", "corpus", shard)
        opened.append(Shard(tmp_path / f"train-00{number}"))
    flat = [token for shard in shards for document in shard for token in document]
    starts = np.cumsum([0, *(len(document) for shard in shards for document in shard)])
    inside = set(starts.tolist())
    reader = StreamRows(opened, sequence_length=width, fill=EOS)
    assert reader.num_rows == -(-(len(flat) - 1) // width)
    for row in range(reader.num_rows):
        tokens, labels = np.full((2, width), -7, np.int64)
        found = reader.read(row, tokens, labels)
        places = range(row * width, (row + 1) * width)
        assert tokens.tolist() == [flat[p] if p < len(flat) else EOS for p in places]
        assert labels.tolist() == [-100 if p + 1 in inside or p >= len(flat) else flat[p + 1] for p in places]
        assert found.tolist() == [
            p - places[0] for p in places if p == places[0] or p in inside - {len(flat)}
        ]
