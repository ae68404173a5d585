"""Data sets made by hand: shards and a manifest, without Ray, tokenizer or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import hand_made
from benchmarks.hand_made import BOS, EOS
from data_pipeline.manifest import ShardInfo

__all__ = ["BOS", "EOS", "VOCAB", "Documents", "documents", "write_dataset", "write_one"]

VOCAB = 1000
Documents = list[list[int]]


def documents(seed: int, count: int, *, longest: int = 150, bos: int = BOS, eos: int = EOS) -> Documents:
    """Documents of 2 to `longest` tokens, most of them short; some of BOS and EOS alone."""
    draw = np.random.default_rng(seed)
    lengths = np.minimum(draw.geometric(0.03, count) - 1, longest - 2)
    return [[bos, *draw.integers(3, VOCAB, size=n).tolist(), eos] for n in lengths]


def write_dataset(
    directory: Path,
    splits: Mapping[str, Mapping[str, Sequence[Documents]]],
    *,
    bos: int = BOS,
    eos: int = EOS,
) -> Path:
    """Write the documents of each split, source and shard; returns `directory`."""
    return hand_made.write_documents(directory, splits, vocab_size=VOCAB, bos=bos, eos=eos)


def write_one(directory: Path, name: str, source: str, shard: Documents) -> ShardInfo:
    """Write one shard and describe it."""
    return hand_made.write_one(directory, name, source, shard, vocab_size=VOCAB)
