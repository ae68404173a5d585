"""Batches: one sequence on all meshes and after a resume, every token once, nothing across documents."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline.loader
import data_pipeline.rows
from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from data_pipeline.manifest import verify_files
from data_pipeline.order import EpochOrder, MixtureOrder, shares
from data_pipeline.pack import PieceTable, pack
from tests.data_pipeline.written import BOS, EOS, documents, write_dataset
from tests.distributed import gloo_pool
from tests.training import small_run
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.job import Job
from trellis_dist.training.setup import _open_data

WIDTH, CHUNK = 64, 8
TRAIN = {
    "books": [documents(0, 25), documents(1, 30)],
    "code": [documents(2, 20, longest=20)],
    "web": [documents(3, 12), documents(4, 9)],
}
WEIGHTS = {"books": 1.0, "code": 2.5}
PACKINGS = [(packing, align) for packing in ("concat", "best_fit", "per_document") for align in (1, CHUNK)]
packings = pytest.mark.parametrize(("packing", "align"), PACKINGS)
Rows = list[tuple[list[int], list[int], list[int]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source in three shards."""
    splits = {"train": TRAIN["books"] + TRAIN["code"], "validation": [documents(5, 13)]}
    return write_dataset(
        tmp_path_factory.mktemp("data") / "one", {name: {"corpus": docs} for name, docs in splits.items()}
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources."""
    validation = {"books": [documents(6, 5)], "web": [documents(7, 6)]}
    return write_dataset(
        tmp_path_factory.mktemp("data") / "mixed", {"train": TRAIN, "validation": validation}
    )


@pytest.fixture(scope="module")
def data(folder: Path) -> TokenDataset:
    return TokenDataset(folder, "train", sequence_length=WIDTH, seed=3)


def rows_of(batches: list[Batch]) -> Rows:
    """Tokens, labels and segment starts of each row."""
    rows: Rows = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert (bounds[0], bounds[-1]) == (0, batch.tokens.numel())
        assert (batch.cu_seqlens.diff() > 0).all()
        for place, (tokens, labels) in enumerate(zip(batch.tokens.tolist(), batch.labels.tolist())):
            first = place * WIDTH
            starts = [bound - first for bound in bounds if first <= bound < first + WIDTH]
            assert starts[0] == 0
            rows.append((tokens, labels, starts))
        assert batch.valid_tokens == int((batch.labels != -100).sum())
    return rows


def global_rows(data: TokenDataset, *, dp: int, sp: int, micro: int, counter: int, rows: int = 8) -> Rows:
    """The rows of one global batch, gathered over the ranks of a mesh, its segments joined."""
    gathered: Rows = []
    for rank in range(dp):
        sizes = {"global_batch": rows, "micro_batch": micro, "dp_rank": rank, "dp_size": dp}
        parts = [BatchLoader(data, **sizes).micro_batches(counter) for _ in range(sp)]
        found = rows_of(parts[0])
        for number, batch in enumerate(parts[0]):
            cut = [segment(parts[r][number], sp, r) for r in range(sp)]
            assert torch.equal(torch.cat([tokens for tokens, _ in cut], 1), batch.tokens)
            assert torch.equal(torch.cat([labels for _, labels in cut], 1), batch.labels)
        gathered += found
    return gathered


def segment(batch: Batch, sp: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sequence rank computes on; the cut refuses documents that start inside a chunk."""
    segments = Segments(Mesh(sp=sp, sp_rank=rank), chunk_size=CHUNK)
    tokens, labels, _ = segments.cut(batch.tokens, batch.labels, batch.cu_seqlens)
    assert tokens.shape[1] == WIDTH // sp
    return tokens, labels


@packings
@settings(max_examples=8, deadline=None)
@given(draw=st.data())
def test_every_mesh_and_a_resume_across_them_see_one_sequence(
    mixed: Path, packing: str, align: int, draw: st.DataObject
) -> None:
    options = {"sequence_length": WIDTH, "seed": 3, "packing": packing, "align": align, "weights": WEIGHTS}
    meshes = [(1, 1), (2, 1), (4, 1)] + [(2, 2)] * (align > 1)
    steps = 2 * -(-TokenDataset(mixed, "train", **options).num_samples // 8)
    whole: Rows = []
    for step in range(steps):
        data = known(mixed, **options)
        whole += global_rows(data, dp=1, sp=1, micro=8, counter=8 * step)
    resumed: Rows = []
    while (step := len(resumed) // 8) < steps:  # another start of the run, on another mesh
        dp, sp = draw.draw(st.sampled_from(meshes))
        micro = draw.draw(st.sampled_from([1, 2]))
        data = TokenDataset(mixed, "train", verify=False, **options)
        for later in range(step, min(steps, step + draw.draw(st.integers(1, steps)))):
            resumed += global_rows(data, dp=dp, sp=sp, micro=micro, counter=8 * later)
    assert resumed == whole


OPENED: dict[tuple[object, ...], TokenDataset] = {}


def known(folder: Path, **options: object) -> TokenDataset:
    key = (folder, *map(str, options.values()))
    if key not in OPENED:
        OPENED[key] = TokenDataset(folder, "train", **options)
    return OPENED[key]


def epoch(data: TokenDataset, *, shuffle: bool) -> list[Batch]:
    loader = BatchLoader(data, global_batch=8, micro_batch=4, shuffle=shuffle)
    return [b for step in range(loader.num_batches) for b in loader.micro_batches(step * 8)]


@packings
def test_every_token_but_bos_is_predicted_once(mixed: Path, packing: str, align: int) -> None:
    data = TokenDataset(mixed, "train", sequence_length=WIDTH, seed=1, packing=packing, align=align)
    stored = [data.tokens_of(i).tolist() for i in range(data.num_documents)]
    assert stored == [document for shards in TRAIN.values() for shard in shards for document in shard]
    pairs: Counter[tuple[int, int]] = Counter()
    for tokens, labels, starts in rows_of(epoch(data, shuffle=False)):
        assert all(start % align == 0 for start in starts)
        inside = [i for i in range(WIDTH) if labels[i] != -100]
        pairs.update((tokens[i], labels[i]) for i in inside)
    expected = Counter(pair for document in stored for pair in pairwise(document))
    assert pairs == expected
    assert data.utilisation == sum(expected.values()) / (data.num_samples * WIDTH)
    assert sum(expected.values()) == data.num_tokens - data.num_documents


@packings
def test_a_segment_is_a_piece_of_a_document_or_fill(mixed: Path, packing: str, align: int) -> None:
    data = TokenDataset(mixed, "train", sequence_length=WIDTH, seed=1, packing=packing, align=align)
    text = ["," + ",".join(map(str, data.tokens_of(i).tolist())) + "," for i in range(data.num_documents)]
    whole = "|".join(text)
    for tokens, labels, starts in rows_of(epoch(data, shuffle=True)):
        for start, stop in zip(starts, [*starts[1:], WIDTH]):
            piece = [tokens[i] for i in range(start, stop) if labels[i] != -100]
            last = [labels[i] for i in range(start, stop) if labels[i] != -100][-1:]
            assert "," + ",".join(map(str, piece + last)) + "," in whole or not piece
            assert labels[start : start + len(piece)] == [*piece[1:], *last]
            rest = tokens[start + len(piece) : stop]
            assert set(rest) <= {EOS} or (packing, align, rest) == ("concat", 1, [BOS])


@pytest.mark.parametrize(("bos", "eos"), [(7, 7), (7, 8)])
@packings
def test_ids_of_bos_and_eos_decide_nothing(
    tmp_path: Path, packing: str, align: int, bos: int, eos: int
) -> None:
    """One id for both, and documents that hold it: labels follow from where documents begin."""
    docs = [[bos, 3, eos, eos, 4, bos, eos], [bos, eos], [bos, bos, eos, 5, eos], [bos, *[eos] * 90, eos]]
    write_dataset(tmp_path, {"train": {"corpus": [docs]}}, bos=bos, eos=eos)
    data = TokenDataset(tmp_path, "train", sequence_length=WIDTH, seed=0, packing=packing, align=align)
    found: Counter[int] = Counter()
    for batch in epoch(data, shuffle=False):
        found.update(batch.labels[batch.labels != -100].tolist())
    assert found == Counter(token for document in docs for token in document[1:])


def test_concat_reads_the_stream_in_order(data: TokenDataset) -> None:
    seen = [label for batch in epoch(data, shuffle=False) for label in batch.labels.flatten().tolist()]
    stored = [data.tokens_of(i).tolist() for i in range(data.num_documents)]
    assert [label for label in seen if label != -100] == [t for document in stored for t in document[1:]]
    flat = [token for document in stored for token in document]
    tokens = [token for batch in epoch(data, shuffle=False) for token in batch.tokens.flatten().tolist()]
    assert tokens[: len(flat)] == flat
    assert set(tokens[len(flat) :]) <= {EOS}


@packings
def test_validation_takes_every_row_once_and_ends_with_empty_rows(
    mixed: Path, packing: str, align: int
) -> None:
    data = TokenDataset(mixed, "validation", sequence_length=WIDTH, seed=0, packing=packing, align=align)
    loader = BatchLoader(data, global_batch=16, micro_batch=8, shuffle=False)
    batches = [b for step in range(loader.num_batches + 1) for b in loader.micro_batches(step * 16)]
    assert sum(batch.valid_tokens for batch in batches) == data.num_tokens - data.num_documents
    assert batches[-1].valid_tokens == 0
    assert batches[-1].cu_seqlens.tolist() == list(range(0, 8 * WIDTH + 1, WIDTH))


def test_epochs_and_seeds_reshuffle_and_a_counter_is_all_the_state(folder: Path) -> None:
    data, again = (TokenDataset(folder, "train", sequence_length=WIDTH, seed=0) for _ in range(2))
    other = TokenDataset(folder, "train", sequence_length=WIDTH, seed=1)
    loaders = [BatchLoader(d, global_batch=4, micro_batch=4) for d in (data, again, other)]
    for counter in (0, 8, 3 * data.num_samples + 5):
        first, second, third = (loader.micro_batches(counter)[0].tokens for loader in loaders)
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    rows = data.order.rows(np.arange(2 * data.num_samples), 4)[0].reshape(2, -1)
    assert not (rows[0] == rows[1]).all()
    assert not (rows[0] == np.arange(data.num_samples)).all()


def test_one_source_keeps_the_order_it_had_without_mixtures(data: TokenDataset, folder: Path) -> None:
    samples = np.arange(3 * data.num_samples)
    before = EpochOrder(data.fingerprint, data.seed, data.num_samples).rows(samples)
    np.testing.assert_array_equal(data.order.rows(samples, 4)[0], before)
    weighted = TokenDataset(folder, "train", sequence_length=WIDTH, seed=3, weights={"corpus": 0.25})
    np.testing.assert_array_equal(weighted.order.rows(samples, 4)[0], before)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_the_order_is_a_permutation_of_any_size(size: int, seed: int) -> None:
    rows = EpochOrder("fingerprint", seed, size).rows(np.arange(size, 2 * size))
    assert sorted(rows) == list(range(size))


def test_the_order_is_even() -> None:
    # Row 0's place over many epochs: chi-square, 9 degrees of freedom, below its 99.99% quantile.
    size, epochs = 10, 2000
    rows = EpochOrder("fingerprint", 0, size).rows(np.arange(size * epochs)).reshape(epochs, size)
    counts = np.bincount(np.argmin(rows, axis=1), minlength=size)
    assert ((counts - epochs / size) ** 2 / (epochs / size)).sum() < 33.7


def test_the_orders_are_pinned() -> None:
    # A resume on another version of the package or of numpy must see the same sequence.
    assert EpochOrder("f", 1, 11).rows(np.arange(11)).tolist() == [4, 6, 10, 3, 5, 0, 8, 1, 2, 7, 9]
    mixture = MixtureOrder("f", 1, {"a": 3, "b": 8}, {"a": 0.5, "b": 0.5})
    assert mixture.shares == {"a": 6, "b": 5}
    assert mixture.rows(np.arange(11)).tolist() == [0, 4, 8, 2, 1, 1, 5, 2, 0, 3, 6]
    assert mixture.rows(np.arange(11, 22)).tolist() == [0, 10, 7, 2, 1, 9, 0, 1, 2, 9, 7]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.one_of(st.none(), st.floats(0.01, 100)), min_size=4, max_size=4),
)
def test_a_mixture_keeps_its_shares_and_walks_through_each_source(
    sizes: list[int], weights: list[float | None]
) -> None:
    named = {f"s{k}": size for k, size in enumerate(sizes)}
    given_weights = {f"s{k}": w for k, w in enumerate(weights[: len(sizes)]) if w is not None}
    if refusal := refusal_of(named, given_weights):
        check_the_least_weight(refusal, named, given_weights)
        return
    order = MixtureOrder("f", 0, named, given_weights)
    total, epochs = sum(sizes), 3
    rows = order.rows(np.arange(epochs * total)).reshape(epochs, total)
    full = [given_weights.get(name, size) for name, size in named.items()]
    first = 0
    for (name, size), weight in zip(named.items(), full):
        count = order.shares[name]
        assert abs(count - total * weight / sum(full)) <= 1
        inside = (rows >= first) & (rows < first + size)
        assert inside.sum(axis=1).tolist() == [count] * epochs
        # Every full pass over the source holds each row once, whichever epochs of the mixture it spans.
        times = np.bincount(rows[inside] - first, minlength=size)
        assert times.max() - times.min() <= 1
        assert times.sum() == epochs * count
        first += size
    if not given_weights:
        assert all(sorted(epoch_rows) == list(range(total)) for epoch_rows in rows)


def check_the_least_weight(refusal: str, sizes: dict[str, int], weights: dict[str, float]) -> None:
    """The weight that a refusal names gives the source a row (another may be refused then), and not many."""
    found = re.search(r"data\.mixture\.(\w+)\.weight = .* use (\S+) or more, or leave it out", refusal)
    assert found, refusal
    name, enough = found[1], float(found[2])
    total = {source: weights.get(source, size) for source, size in sizes.items()}
    assert total[name] < enough
    share = sum(sizes.values()) * enough / (sum(total.values()) - total[name] + enough)
    assert 1 <= share < 1.01
    assert f"data.mixture.{name}." not in refusal_of(sizes, weights | {name: enough})


def refusal_of(sizes: dict[str, int], weights: dict[str, float]) -> str:
    try:
        assert all(shares(sizes, weights).values())
    except ValueError as error:
        return str(error)
    return ""


def test_a_weight_that_gives_no_row_is_refused_with_the_least_that_does() -> None:
    sizes = {"web": 100, "books": 100}
    with pytest.raises(
        ValueError, match=r"data\.mixture\.books\.weight = 0\.001 .* none of the 200 rows .* use 0\.00503 or"
    ):
        shares(sizes, {"web": 1.0, "books": 0.001})
    assert shares(sizes, {"web": 1.0, "books": 0.00503}) == {"web": 199, "books": 1}
    with pytest.raises(ValueError, match=r"data\.mixture\.books\.weight = 100 beside 1e\+06"):
        shares(sizes, {"web": 1e6})


def test_weights_change_the_order_and_wrong_ones_are_one_line(mixed: Path) -> None:
    options = {"sequence_length": WIDTH, "seed": 3}
    plain, weighted = (TokenDataset(mixed, "train", weights=w, **options) for w in (None, WEIGHTS))
    samples = np.arange(plain.num_samples)
    assert sorted(plain.order.rows(samples, 4)[0]) == samples.tolist()
    assert plain.order.rows(samples, 4)[0].tolist() != weighted.order.rows(samples, 4)[0].tolist()
    assert list(plain.source_rows) == ["books", "code", "web"]
    with pytest.raises(
        ValueError, match=r"data\.mixture\.maths has a weight, but .* has books, code, web; run"
    ):
        TokenDataset(mixed, "train", weights={"maths": 1.0}, **options)
    with pytest.raises(ValueError, match=r"data\.mixture\.web\.weight = 0: use a number above 0"):
        TokenDataset(mixed, "train", weights={"web": 0}, **options)
    with pytest.raises(ValueError, match=r"data\.mixture\.b has a weight, but no rows"):
        shares({"a": 5, "b": 0}, {"b": 1.0})
    assert shares({"a": 5, "b": 0}, {"a": 1.0}) == {"a": 5, "b": 0}


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_corrupt_shard_is_refused_by_name_with_the_remedy(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / f"train-00000.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"train-00000\.{suffix} is damaged.*delete it and run"):
        TokenDataset(tmp_path / "copy", "train", sequence_length=WIDTH, seed=0)
    TokenDataset(tmp_path / "copy", "validation", sequence_length=WIDTH, seed=0)


def test_all_cores_hash_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def spy(directory: Path, hashes: dict[str, str], *, threads: int = 1) -> list[str]:
        found.append(threads)
        return verify_files(directory, hashes, threads=threads)

    monkeypatch.setattr(data_pipeline.loader, "verify_files", spy)
    monkeypatch.setattr(data_pipeline.loader, "default_workers", lambda: 5)
    TokenDataset(folder, "train", sequence_length=WIDTH, seed=0)
    assert found == [5]


def packed_case(job: Job) -> tuple[int, int]:
    """Tables that this rank packs when a run opens its data, and rows of the training split."""
    made = 0

    def slow(*args: Any, **options: Any) -> PieceTable:
        nonlocal made
        made += 1
        time.sleep(0.2)  # a rank that does not wait would find the file missing too
        return pack(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_pipeline.rows, "pack", slow)
        train, _ = _open_data(job)
    return made, train.num_samples


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_makes_the_row_indexes_and_the_others_find_them(ranks: int, tmp_path: Path) -> None:
    job = small_run.make_job(small_run.write_dataset(tmp_path / "set"))
    job = dataclasses.replace(job, data=dataclasses.replace(job.data, packing="best_fit"))
    found = [packed_case(job)] if ranks == 1 else gloo_pool(ranks).run(packed_case, job)
    assert [made for made, _ in found] == [2, 0][:ranks]  # train and validation
    assert len({rows for _, rows in found}) == 1


def test_a_missing_data_set_or_split_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prepared data set in .*run `trellis prepare`"):
        TokenDataset(tmp_path, "train", sequence_length=WIDTH, seed=0)
    with pytest.raises(ValueError, match=r"no split 'test' in .*: it has train, validation"):
        TokenDataset(folder, "test", sequence_length=WIDTH, seed=0)


@pytest.mark.parametrize(
    "sizes",
    [{"global_batch": 6, "micro_batch": 4}, {"global_batch": 8, "micro_batch": 2, "dp_size": 3}],
)
def test_batches_that_do_not_divide_are_refused_with_the_arithmetic(
    data: TokenDataset, sizes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=r"is no multiple of micro_batch \d x dp \d = \d"):
        BatchLoader(data, **sizes)


def test_what_cannot_be_asked_is_refused(data: TokenDataset, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dp_rank = 2"):
        BatchLoader(data, global_batch=4, micro_batch=1, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match=r"data\.sequence_length = 1: use 2"):
        TokenDataset(folder, "train", sequence_length=1, seed=0)
    with pytest.raises(ValueError, match="no multiple of the chunk size 48"):
        TokenDataset(folder, "train", sequence_length=WIDTH, seed=0, align=48)
    with pytest.raises(IndexError):
        data.read(data.num_samples, *np.empty((2, WIDTH), np.int64))
    with pytest.raises(IndexError):
        data.tokens_of(data.num_documents)
    empty = write_dataset(tmp_path, {"train": {"corpus": [[]]}})
    for packing in ("concat", "best_fit"):
        nothing = TokenDataset(empty, "train", sequence_length=WIDTH, seed=0, packing=packing)
        with pytest.raises(ValueError, match="the train split has no rows"):
            BatchLoader(nothing, global_batch=4, micro_batch=4)
