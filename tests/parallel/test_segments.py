"""Cutting batches over sp: what each rank keeps, and which documents continue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis_dist.models.context import packed_context
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments

CHUNK = 4


def segments_of(sp: int, sp_rank: int) -> Segments:
    return Segments(Mesh(sp=sp, sp_rank=sp_rank, rank=sp_rank), chunk_size=CHUNK)


def batch(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length)


def test_a_batch_is_left_alone_without_sequence_ranks():
    tokens, bounds = batch(2, 7), torch.tensor([0, 3, 7, 14])
    cut = Segments(Mesh(), chunk_size=CHUNK).cut(tokens, tokens + 1, bounds)
    assert cut[0] is tokens
    assert cut[2] is bounds


def test_labels_are_cut_after_they_were_shifted():
    tokens = batch(2, 16)
    for rank in range(2):
        part, labels, bounds = segments_of(2, rank).cut(tokens, tokens + 1, None)
        assert torch.equal(part, tokens[:, 8 * rank : 8 * rank + 8])
        assert torch.equal(labels, part + 1)
        assert bounds is None


@pytest.mark.parametrize(
    ("rank", "bounds", "before"),
    [(0, None, (0, 0)), (1, [0, 4, 8, 16], (8, 8)), (2, [0, 4, 8, 16], (0, 16)), (3, None, (4, 24))],
)
def test_documents_are_found_in_each_segment(rank: int, bounds: list[int] | None, before: tuple[int, int]):
    # Row 0 starts documents at 0, 12, 16 and 20, row 1 at 0 only; segments of 8 tokens.
    segments = segments_of(4, rank)
    tokens = batch(2, 32)
    _, _, local = segments.cut(tokens, tokens, torch.tensor([0, 12, 16, 20, 32, 64]))
    assert (None if local is None else local.tolist()) == bounds
    assert segments.before(2, at_most=99) == before
    assert segments.before(2, at_most=5) == tuple(min(count, 5) for count in before)
    assert segments.continues(2) == tuple(count > 0 for count in before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_segments_together_hold_every_document_start_once(data: st.DataObject):
    rows, sp, chunks = (data.draw(st.integers(1, top)) for top in (3, 4, 3))
    length = chunks * CHUNK
    total = length * sp
    grid = range(0, rows * total, CHUNK)
    starts = {0} | {row * total for row in range(rows)} | data.draw(st.sets(st.sampled_from(list(grid))))
    bounds = torch.tensor([*sorted(starts), rows * total])
    found = set()
    for rank in range(sp):
        segments = segments_of(sp, rank)
        tokens = batch(rows, total)
        part, _, local = segments.cut(tokens, tokens, bounds)
        continues = segments.continues(rows) if sp > 1 else (False,) * rows
        local_starts = set(range(0, rows * length, length)) if local is None else set(local[:-1].tolist())
        carried = {row * length for row in range(rows) if continues[row]}
        found |= {int(part.flatten()[start]) for start in local_starts - carried}
    assert found == starts


@pytest.mark.parametrize(
    ("length", "bounds", "message"),
    [
        (20, None, "rows of 20 tokens do not cut into mesh.sp = 2 segments .* multiple of 8"),
        (16, [0, 16, 22, 32], "starts at token 6 of row 1, no multiple of the chunk size 4"),
        (16, [0, 8, 16], "cu_seqlens runs from 0 to 16: it must rise from 0 to 32"),
        (16, [0, 16, 8, 32], "it must rise"),
    ],
)
def test_what_does_not_fit_the_chunks_is_refused(length: int, bounds: list[int] | None, message: str):
    tokens = batch(2, length)
    with pytest.raises(ValueError, match=message):
        segments_of(2, 0).cut(tokens, tokens, None if bounds is None else torch.tensor(bounds))


def test_packed_activations_that_were_not_cut_are_refused():
    segments = segments_of(2, 1)
    assert segments.rows(3, packed=False) == 3
    with pytest.raises(ValueError, match=r"pass the whole rows and their cu_seqlens through Segments\.cut"):
        segments.rows(1, packed=True)


def test_the_whole_rows_are_the_same_on_every_rank():
    tokens = batch(2, 32)
    # Ranks 1 and 2 of row 0 hold starts of their own, rank 3 none: its activations are not packed.
    bounds = torch.tensor([0, 12, 16, 20, 32, 64])
    expected = packed_context(bounds, rows=2, length=32, chunk_sizes=[CHUNK], conv_kernel=0)
    packed = []
    for rank in range(4):
        segments = segments_of(4, rank)
        packed.append(segments.cut(tokens, tokens, bounds)[2] is not None)
        whole = segments.whole_rows(2, torch.device("cpu"))
        assert whole.lengths == expected.lengths == (12, 4, 4, 12, 32)
        assert torch.equal(whole.positions, expected.positions)
        assert torch.equal(whole.layout(CHUNK).bounds, expected.layout(CHUNK).bounds)
        assert len(whole.layouts) == 1
        assert segments.whole_rows(2, torch.device("cpu")) is whole
    assert packed == [False, True, True, False]


def test_row_starts_are_documents_of_the_whole_rows_whether_named_or_not():
    segments, tokens = segments_of(2, 1), batch(2, 16)
    segments.cut(tokens, tokens, torch.tensor([0, 20, 32]))
    assert segments.whole_rows(2, torch.device("cpu")).lengths == (16, 4, 12)
    segments.cut(tokens, tokens, None)
    assert not segments.whole_rows(2, torch.device("cpu")).packed


def test_empty_documents_at_the_end_are_none():
    segments, tokens = segments_of(2, 1), batch(2, 16)
    _, _, local = segments.cut(tokens, tokens, torch.tensor([0, 12, 16, 16, 32, 32, 32]))
    assert local.tolist() == [0, 4, 8, 16]
    assert segments.before(2, at_most=99) == (8, 8)
    assert segments.whole_rows(2, torch.device("cpu")).lengths == (12, 4, 16)


def test_an_earlier_batch_can_be_taken_up_again():
    segments, tokens = segments_of(2, 1), batch(1, 16)
    segments.cut(tokens, tokens, torch.tensor([0, 4, 16]))
    first = segments.documents
    segments.cut(tokens, tokens, torch.tensor([0, 8, 16]))
    assert segments.continues(1) == (False,)
    segments.documents = first
    assert segments.before(1, at_most=99) == (4,)
    assert segments.whole_rows(1, torch.device("cpu")).lengths == (4, 12)
