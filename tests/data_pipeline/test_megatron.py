"""megatron-core reads the shards: its IndexedDataset by documents, its GPTDataset by samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.loader import TokenDataset
from tests.data_pipeline.written import BOS, EOS, VOCAB, documents, write_dataset

WIDTH = 64
SHARDS = [documents(0, 60), documents(1, 45)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": {"corpus": SHARDS}})


def test_its_indexed_dataset_gives_the_same_documents(folder: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = TokenDataset(folder, "train", sequence_length=WIDTH, seed=0)
    theirs = []
    for number in range(len(SHARDS)):
        opened = IndexedDataset(str(folder / f"train-{number:05d}"))
        theirs += [document.copy() for document in opened]  # its views die with it
    assert len(theirs) == data.num_documents
    for index, document in enumerate(theirs):
        np.testing.assert_array_equal(data.tokens_of(index), document)


@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_its_gpt_dataset_gives_the_same_tokens(folder: Path, tmp_path: Path, number: int) -> None:
    """All documents whole and in its own order: every sample is the next T + 1 tokens, overlapping by one."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    prefix = str(folder / f"train-{number:05d}")
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=EOS, bos=BOS, unique_identifiers={"class": "stand-in"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=WIDTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, config)
    found = GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    order = found.document_index.tolist()
    assert sorted(order) == list(range(len(SHARDS[number])))
    stream = [token for index in order for token in SHARDS[number][index]]
    assert len(found) == (len(stream) - 1) // WIDTH
    for place, row in enumerate(found.shuffle_index.tolist()):
        sample = found[place]
        assert sample["tokens"].tolist() == stream[row * WIDTH : (row + 1) * WIDTH]
        assert sample["labels"].tolist() == stream[row * WIDTH + 1 : (row + 1) * WIDTH + 1]
        assert ((sample["loss_mask"] == 0) == (sample["tokens"] == EOS)).all()
