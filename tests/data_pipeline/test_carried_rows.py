"""Rows for layers that carry their states: places read runs of rows, and know what they have read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from data_pipeline.order import MixtureOrder, RunOrder
from tests.data_pipeline.written import EOS, documents, write_dataset

WIDTH, CHUNK, PLACES, RUN = 16, 8, 8, 5
TRAIN = {
    "books": [documents(0, 9, longest=200), documents(1, 14)],
    "code": [documents(2, 20, longest=20)],
    "web": [documents(3, 6, longest=90), documents(4, 9)],
}
PACKINGS = [(packing, align) for packing in ("concat", "best_fit", "per_document") for align in (1, CHUNK)]
packings = pytest.mark.parametrize(("packing", "align"), PACKINGS)
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # tokens, labels, starts, carried


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "mixed", {"train": TRAIN})


def opened(
    folder: Path, packing: str = "concat", align: int = 1, run: int = RUN, **more: object
) -> TokenDataset:
    options = {"sequence_length": WIDTH, "seed": 3, "packing": packing, "align": align, "carry_rows": run}
    return TokenDataset(folder, "train", verify=False, **options, **more)


def rows_of(batches: list[Batch], *, first: int = 0) -> list[Row]:
    """Rows in the order of their places, which begin at ``first``."""
    rows: list[Row] = []
    for batch in batches:
        assert batch.slot == first + len(rows)
        bounds = batch.cu_seqlens.tolist()
        carried = [0] * len(batch.tokens) if batch.carried is None else batch.carried.tolist()
        for place, (tokens, labels) in enumerate(zip(batch.tokens.tolist(), batch.labels.tolist())):
            begin = place * WIDTH
            starts = [bound - begin for bound in bounds if begin <= bound < begin + WIDTH]
            rows.append((tuple(tokens), tuple(labels), tuple(starts), carried[place]))
    return rows


def epoch(data: TokenDataset) -> list[list[Row]]:
    """The rows of every batch; those of one place stand at the same index."""
    loader = BatchLoader(data, global_batch=PLACES, micro_batch=4)
    steps = -(-data.order.size // PLACES // RUN) * RUN
    return [rows_of(loader.micro_batches(step * PLACES)) for step in range(steps)]


def histories(steps: list[list[Row]]) -> Iterator[tuple[list[Row], Row]]:
    """Each row with the rows of its run before it."""
    for step, rows in enumerate(steps):
        begin = step // RUN * RUN
        for place, row in enumerate(rows):
            yield [steps[earlier][place] for earlier in range(begin, step)], row


@packings
def test_what_is_carried_is_the_document_so_far(mixed: Path, packing: str, align: int) -> None:
    data = opened(mixed, packing, align)
    whole = [f",{','.join(map(str, data.tokens_of(i).tolist()))}," for i in range(data.num_documents)]
    seen = Counter[str]()
    for before, (tokens, labels, starts, carried) in histories(epoch(data)):
        assert 0 <= carried <= WIDTH * len(before)
        if carried:
            assert before[-1][1][-1] == tokens[0], "the label of the last token is the next row's first"
            stop = starts[1] if len(starts) > 1 else WIDTH
            here = [token for token, label in zip(tokens[:stop], labels[:stop]) if label != -100]
            piece = [token for row in before for token in row[0]][-carried:] + here
            assert any(f",{','.join(map(str, piece))}," in document for document in whole)
            assert (carried - 1) // WIDTH == 0 or before[-1][2] == (0,), "it fills the rows between"
            seen["two rows and more" if carried > 2 * WIDTH else "one row"] += 1
        elif before:
            ended = before[-1][1][-1] in (-100, EOS)
            assert ended or packing == "best_fit"  # where the rest of a document may be in any row
            seen["new"] += 1
    assert min(seen["two rows and more"], seen["one row"]) > 3, seen
    assert seen["new"], seen


@packings
def test_an_epoch_reads_every_row_in_runs(mixed: Path, packing: str, align: int) -> None:
    data = opened(mixed, packing, align)
    plain = BatchLoader(data, global_batch=PLACES, micro_batch=PLACES, shuffle=False)
    expected: Counter[tuple[object, ...]] = Counter()
    for step in range(plain.num_batches):
        (batch,) = plain.micro_batches(step * PLACES)
        assert batch.carried is None, "validation rows stand alone"
        expected.update(row[:3] for row in rows_of([batch]) if set(row[1]) != {-100})
    order, size = data.order, data.order.size
    rows, inside = order.rows(np.arange(size), 1)  # one place reads the epoch, run after run
    assert inside.tolist() == [i % RUN for i in range(size)]
    assert (np.diff(rows.reshape(-1, RUN)) == 1).all()
    times = np.bincount(rows, minlength=data.num_samples)
    assert times.min() == 1
    again = {name: -(-count // RUN) * RUN - count for name, count in data.source_rows.items()}
    assert (times == 2).sum() == sum(again.values())
    assert times.max() <= 2
    found = Counter(row[:3] for rows in epoch(data) for row in rows)
    assert not expected - found


@settings(max_examples=10, deadline=None)
@given(draw=st.data(), case=st.sampled_from(PACKINGS), weights=st.sampled_from([None, {"books": 2.0}]))
def test_every_mesh_and_a_resume_across_them_see_one_sequence(
    mixed: Path, draw: st.DataObject, case: tuple[str, int], weights: dict[str, float] | None
) -> None:
    data = opened(mixed, *case, weights=weights)
    steps = 2 * -(-data.order.size // PLACES)
    alone = BatchLoader(data, global_batch=PLACES, micro_batch=PLACES)
    whole = [rows_of(alone.micro_batches(step * PLACES)) for step in range(steps)]
    resumed: list[list[Row]] = []
    while (step := len(resumed)) < steps:  # another start of the run, on another mesh
        dp, micro = draw.draw(st.sampled_from([(1, 4), (2, 1), (2, 4), (4, 2)]))
        again = opened(mixed, *case, weights=weights)
        for later in range(step, min(steps, step + draw.draw(st.integers(1, steps)))):
            gathered: list[Row] = []
            for rank in range(dp):
                sizes = {"global_batch": PLACES, "micro_batch": micro, "dp_rank": rank, "dp_size": dp}
                batches = BatchLoader(again, **sizes).micro_batches(later * PLACES)
                gathered += rows_of(batches, first=rank * PLACES // dp)
            resumed.append(gathered)
    assert resumed == whole


def test_runs_of_one_row_are_the_rows_as_they_were(mixed: Path) -> None:
    sizes = {"a": 30, "b": 17}
    samples = np.arange(3 * 47)
    rows, inside = RunOrder("f", 1, sizes, length=1).rows(samples, 4)
    np.testing.assert_array_equal(rows, MixtureOrder("f", 1, sizes).rows(samples))
    assert not inside.any()
    (batch,) = BatchLoader(opened(mixed, run=1), global_batch=4, micro_batch=4).micro_batches(0)
    assert batch.carried is None


@pytest.mark.parametrize("length", [2, 7, 64])
def test_weights_share_an_epoch_among_runs(length: int) -> None:
    sizes, places = {"a": 90, "b": 400}, 4
    order = RunOrder("f", 1, sizes, {"a": 0.5, "b": 0.5}, length=length)
    assert sum(order.shares.values()) == order.size
    rows, _ = order.rows(np.arange(order.size * places), places)  # `places` epochs
    assert int((rows < 90).sum()) == order.shares["a"] * places
    assert abs(order.shares["a"] - order.size / 2) <= length
    # A source without a weight has its rows for one, not its runs.
    partial = RunOrder("f", 1, sizes, {"a": 400.0}, length=length)
    assert abs(partial.shares["a"] - partial.size / 2) <= length


def test_refusals_name_runs() -> None:
    with pytest.raises(
        ValueError, match=r"data\.carry_rows = 64, but source 'a' has 40 rows: use 40 or fewer"
    ):
        RunOrder("f", 1, {"a": 40, "b": 400}, length=64)
    with pytest.raises(ValueError, match=r"none of the 9 runs of data\.carry_rows = 64 rows of an epoch"):
        RunOrder("f", 1, {"a": 400, "b": 100}, {"a": 0.96, "b": 0.04}, length=64)


def test_a_batch_of_another_size_on_the_way_is_refused(mixed: Path) -> None:
    loader = BatchLoader(opened(mixed), global_batch=PLACES, micro_batch=4)
    with pytest.raises(ValueError, match=r"a counter of 12 samples is inside a batch of 8.* cannot change"):
        loader.micro_batches(12)
    with pytest.raises(ValueError, match=r"data\.carry_rows = 0: use 1"):
        opened(mixed, run=0)
