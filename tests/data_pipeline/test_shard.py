from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.pack import Stream
from data_pipeline.shard import Shard, token_dtype, write_shard
from trellis_dist.files import REAL, sha256_file

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, *range(3, 60), 2]]


def write(stem: Path, documents: list[list[int]], vocab_size: int = 400) -> None:
    written = write_shard(stem, map(np.array, documents), dtype=token_dtype(vocab_size))
    assert written.sha256_bin == sha256_file(stem.with_suffix(".bin"))
    assert written.sha256_idx == sha256_file(stem.with_suffix(".idx"))
    assert (written.documents, written.tokens) == (len(documents), sum(map(len, documents)))


@pytest.mark.parametrize("vocab_size", [400, 65499, 65500, 200_000])
def test_megatrons_reader_gives_the_same_documents(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    write(tmp_path / "train-00000", documents, vocab_size)
    opened = IndexedDataset(str(tmp_path / "train-00000"))
    assert [opened[i].tolist() for i in range(len(opened))] == documents
    assert opened.document_indices.tolist() == list(range(len(documents) + 1))
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_megatrons_writer_gives_the_same_bytes(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write(tmp_path / "ours", DOCUMENTS)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_full_disk_leaves_the_old_shard_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train-00000", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(REAL, "fsync_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "train-00000", [[1, 9, 2]])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".idx", lambda data: b"", "is no Megatron index"),
        (".idx", lambda data: data[:40], "is damaged"),
        (".idx", lambda data: data[:-1], "is damaged"),
        (".idx", lambda data: data[:26] + b"\x09" + data[27:], "is damaged"),
        (".bin", lambda data: data[:-1], "its index says"),
        (".bin", None, "is missing"),
    ],
)
def test_a_malformed_shard_is_named(tmp_path: Path, suffix: str, damage, message: str) -> None:
    write(tmp_path / "train-00000", DOCUMENTS)
    path = tmp_path / f"train-00000{suffix}"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(ValueError, match=rf"train-00000\{suffix} .*{message}"):
        Shard(tmp_path / "train-00000")


def test_documents_are_found_without_reading_the_index(tmp_path: Path) -> None:
    documents = [[1, 2], [], [1, 5, 2], []]
    write(tmp_path / "train-00000", documents)
    shard = Shard(tmp_path / "train-00000")
    assert (shard.documents, shard.starts.tolist()) == (4, [0, 2, 2, 5, 5])
    assert [shard.document(i).tolist() for i in range(4)] == documents
    assert shard.starts_between(1, 5).tolist() == [2, 2]
    assert not shard.tokens.flags.writeable
    write(tmp_path / "train-00001", [])
    empty = Shard(tmp_path / "train-00001")
    assert (empty.documents, empty.starts.tolist(), len(empty.tokens)) == (0, [0], 0)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_stream_slices_over_shard_borders(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    folder = tmp_path_factory.mktemp("stream")
    lengths = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
    documents = [[list(range(3, 3 + n)) for n in shard] for shard in lengths]
    for index, shard in enumerate(documents):
        write(folder / f"s{index}", shard)
    stream = Stream([Shard(folder / f"s{index}") for index in range(len(documents))])
    flat = [token for shard in documents for document in shard for token in document]
    starts = np.cumsum([0, *(n for shard in lengths for n in shard)])
    assert len(stream) == len(flat)
    assert stream.document_starts.tolist() == starts.tolist()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat) + 5))
    assert stream.slice(start, stop).tolist() == flat[start:stop]
    assert stream.starts_between(start, stop).tolist() == [s for s in starts[:-1] if start <= s < stop]
