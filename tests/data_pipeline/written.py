"""Data sets made by hand: shards and a manifest, without Ray, tokenizer or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest, ShardInfo, SplitInfo, fingerprint_of, write_manifest
from data_pipeline.shard import token_dtype, write_shard

BOS, EOS, VOCAB = 1, 2, 1000
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
    directory.mkdir(parents=True, exist_ok=True)
    infos = {
        split: [
            write_one(directory, f"{split}-{source}-{number:05d}", source, shard)
            for source, shards in sources.items()
            for number, shard in enumerate(shards)
        ]
        for split, sources in splits.items()
    }
    write_manifest(directory, manifest_of(infos, bos=bos, eos=eos))
    return directory


def write_one(directory: Path, name: str, source: str, shard: Documents) -> ShardInfo:
    """Write one shard and describe it."""
    files = write_shard(directory / name, map(np.array, shard), dtype=token_dtype(VOCAB))
    sizes = {"documents": files.documents, "tokens": files.tokens, "bytes": 2 * files.tokens}
    return ShardInfo(
        name=name, source=source, sha256_bin=files.sha256_bin, sha256_idx=files.sha256_idx, **sizes
    )


def manifest_of(infos: Mapping[str, Sequence[ShardInfo]], *, bos: int = BOS, eos: int = EOS) -> Manifest:
    """The manifest of written shards."""
    sums = {
        name: SplitInfo(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
        )
        for name, shards in infos.items()
    }
    tokenizer = {"sha256": "0" * 64, "vocab_size": VOCAB, "bos": bos, "eos": eos}
    return Manifest(
        fingerprint=fingerprint_of("config", tokenizer["sha256"], sums),
        config_digest="config",
        source={"kind": "path", "licence": "none"},
        listing=None,
        tokenizer=tokenizer,
        splits=sums,
        sources={},
        stages={},
        quarantined=0,
        logs={},
    )
