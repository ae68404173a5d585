from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from data_pipeline.manifest import Manifest
from data_pipeline.pack import EpochOrder, mask_of

Prepared = tuple[Path, Manifest]
WIDTH = 64


@pytest.fixture(scope="module")
def data(prepared: Prepared) -> TokenDataset:
    return TokenDataset(prepared[0], "train", sequence_length=WIDTH, seed=3)


def global_batch(data: TokenDataset, *, dp: int, micro: int, counter: int, rows: int = 8) -> list[np.ndarray]:
    """[tokens, labels] of one global batch, gathered over the ranks."""
    batches = [
        batch
        for rank in range(dp)
        for batch in BatchLoader(
            data, global_batch=rows, micro_batch=micro, dp_rank=rank, dp_size=dp
        ).micro_batches(counter)
    ]
    assert all(batch.tokens.shape == (micro, WIDTH) for batch in batches)
    return [torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("tokens", "labels")]


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 400), micro=st.sampled_from([1, 2]))
def test_every_mesh_sees_the_same_global_sequence(data: TokenDataset, step: int, micro: int) -> None:
    one = global_batch(data, dp=1, micro=8, counter=step * 8)
    for dp in (1, 2, 4):
        for ours, theirs in zip(one, global_batch(data, dp=dp, micro=micro, counter=step * 8), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_epoch_predicts_every_token_but_bos_exactly_once(data: TokenDataset) -> None:
    order = EpochOrder(data.fingerprint, data.seed, data.num_samples)
    seen = []
    for batch in epoch(data, shuffle=False):
        assert batch.valid_tokens == int((batch.labels != -100).sum())
        seen += batch.labels[batch.labels != -100].tolist()
    documents = [data.tokens_of(i) for i in range(data.num_documents)]
    assert seen == [token for document in documents for token in document[1:].tolist()]
    assert len(seen) == data.num_tokens - data.num_documents
    for first in (0, 7 * data.num_samples):
        rows = order.rows(np.arange(first, first + data.num_samples))
        assert sorted(rows) == list(range(data.num_samples))


@pytest.mark.parametrize("align", [3, 16, 64])
def test_aligned_documents_start_at_multiples_and_keep_every_target(prepared: Prepared, align: int) -> None:
    length = 192
    plain = TokenDataset(prepared[0], "train", sequence_length=length, seed=1)
    data = TokenDataset(prepared[0], "train", sequence_length=length, seed=1, align=align)
    targets, seen = [], 0
    for index in range(data.num_samples):
        tokens, starts = data.sample(index)
        assert (starts % align == 0).all()
        assert (tokens[starts[1:]] == data.bos_id).all()
        labels = mask_of(tokens[:-1], tokens[1:], data.eos_id)
        targets.append(labels[labels != -100])
        seen += len(starts)
    documents = [plain.tokens_of(i) for i in range(plain.num_documents)]
    np.testing.assert_array_equal(np.concatenate(targets), np.concatenate([d[1:] for d in documents]))
    assert seen >= data.num_documents
    positions = sum(-(-len(d) // align) * align for d in documents)
    assert data.num_samples == -(-(positions - 1) // length)
    assert data.utilisation == sum(map(len, documents)) / (data.num_samples * length)
    assert data.utilisation <= plain.utilisation
    np.testing.assert_array_equal(data.tokens_of(2), plain.tokens_of(2))


def epoch(data: TokenDataset, *, shuffle: bool) -> list[Batch]:
    loader = BatchLoader(data, global_batch=8, micro_batch=4, shuffle=shuffle)
    return [b for step in range(loader.num_batches) for b in loader.micro_batches(step * 8)]


def test_labels_never_cross_documents_and_boundaries_are_document_starts(data: TokenDataset) -> None:
    for batch in epoch(data, shuffle=True)[:20]:
        tokens, labels = batch.tokens, batch.labels
        assert (labels[tokens == data.eos_id] == -100).all()
        inside = labels[:, :-1] != -100
        assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
        assert not (labels == data.bos_id).any()
        bounds = batch.cu_seqlens
        assert bounds.dtype == torch.int32
        assert bounds[0] == 0
        assert bounds[-1] == tokens.numel()
        assert (bounds.diff() > 0).all()
        flat = (tokens.flatten() == data.bos_id).nonzero().flatten().tolist()
        assert set(bounds.tolist()) == {*flat, *range(0, tokens.numel() + 1, WIDTH)}


def test_epochs_and_seeds_reshuffle_and_a_counter_is_all_the_state(prepared: Prepared) -> None:
    directory, _ = prepared
    data = TokenDataset(directory, "train", sequence_length=WIDTH, seed=0)
    again = TokenDataset(directory, "train", sequence_length=WIDTH, seed=0)
    other = TokenDataset(directory, "train", sequence_length=WIDTH, seed=1)
    loaders = [BatchLoader(d, global_batch=4, micro_batch=4) for d in (data, again, other)]
    far = 3 * data.num_samples + 5
    for counter in (0, 8, far):
        first, second, third = (loader.micro_batches(counter)[0].tokens for loader in loaders)
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    order = EpochOrder(data.fingerprint, 0, data.num_samples)
    rows = order.rows(np.arange(2 * data.num_samples)).reshape(2, -1)
    assert not (rows[0] == rows[1]).all()
    assert not (rows[0] == np.arange(data.num_samples)).all()


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


def test_the_order_is_pinned() -> None:
    # A resume on another version of the package or of numpy must see the same sequence.
    assert EpochOrder("f", 1, 11).rows(np.arange(11)).tolist() == [4, 6, 10, 3, 5, 0, 8, 1, 2, 7, 9]


def test_validation_batches_end_with_empty_rows(prepared: Prepared) -> None:
    data = TokenDataset(prepared[0], "validation", sequence_length=WIDTH, seed=0)
    loader = BatchLoader(data, global_batch=16, micro_batch=8, shuffle=False)
    batches = [b for step in range(loader.num_batches + 1) for b in loader.micro_batches(step * 16)]
    assert sum(batch.valid_tokens for batch in batches) == data.num_tokens - data.num_documents
    assert batches[-1].valid_tokens == 0


def test_megatrons_reader_gives_the_same_tokens(prepared: Prepared) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    directory, manifest = prepared
    for name, split in manifest.splits.items():
        data = TokenDataset(directory, name, sequence_length=WIDTH, seed=0)
        theirs = []
        for shard in split.shards:
            opened = IndexedDataset(str(directory / shard.name))
            theirs += [document.copy() for document in opened]  # its views die with it
        assert len(theirs) == data.num_documents == split.documents
        for index, document in enumerate(theirs):
            np.testing.assert_array_equal(data.tokens_of(index), document)
        assert (data.num_tokens, data.num_bytes) == (split.tokens, split.bytes)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_corrupt_shard_is_refused_by_name_with_the_remedy(
    prepared: Prepared, tmp_path: Path, suffix: str
) -> None:
    shutil.copytree(prepared[0], tmp_path / "copy")
    path = tmp_path / "copy" / f"train-00000.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"train-00000\.{suffix} is damaged.*delete it and run"):
        TokenDataset(tmp_path / "copy", "train", sequence_length=WIDTH, seed=0)
    TokenDataset(tmp_path / "copy", "validation", sequence_length=WIDTH, seed=0)


def test_a_missing_data_set_or_split_is_one_line(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prepared data set in .*run `trellis prepare`"):
        TokenDataset(tmp_path, "train", sequence_length=WIDTH, seed=0)
    with pytest.raises(ValueError, match=r"no split 'test' in .*: it has train, validation"):
        TokenDataset(prepared[0], "test", sequence_length=WIDTH, seed=0)


@pytest.mark.parametrize(
    "sizes",
    [{"global_batch": 6, "micro_batch": 4}, {"global_batch": 8, "micro_batch": 2, "dp_size": 3}],
)
def test_batches_that_do_not_divide_are_refused_with_the_arithmetic(
    data: TokenDataset, sizes: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=r"is no multiple of micro_batch \d x dp \d = \d"):
        BatchLoader(data, **sizes)


def test_a_rank_outside_the_mesh_is_refused(data: TokenDataset) -> None:
    with pytest.raises(ValueError, match="dp_rank = 2"):
        BatchLoader(data, global_batch=4, micro_batch=1, dp_rank=2, dp_size=2)


def test_an_index_outside_is_an_error(data: TokenDataset) -> None:
    with pytest.raises(IndexError):
        data.sample(data.num_samples)
    with pytest.raises(IndexError):
        data.tokens_of(data.num_documents)
