"""Data sets made by hand, for runs that need real shards and no text: no Ray, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest, ShardInfo, SplitInfo, fingerprint_of, write_manifest
from data_pipeline.shard import token_dtype, write_shard

__all__ = ["BOS", "EOS", "random_splits", "write_documents", "write_one"]

BOS, EOS = 1, 2
Documents = Iterable[Sequence[int] | np.ndarray]


def random_splits(folder: Path, *, seed: int, vocab_size: int, lengths: Sequence[int]) -> Path:
    """90 documents to train on and 9 to validate on, of these many random tokens between BOS and EOS."""
    draw = np.random.default_rng(seed)

    def documents(count: int) -> list[np.ndarray]:
        sizes = draw.choice(lengths, size=count)
        return [np.array([BOS, *draw.integers(3, vocab_size, size=n), EOS]) for n in sizes]

    splits = {"train": {"corpus": [documents(90)]}, "validation": {"corpus": [documents(9)]}}
    return write_documents(folder, splits, vocab_size=vocab_size)


def write_documents(
    folder: Path,
    splits: Mapping[str, Mapping[str, Sequence[Documents]]],
    *,
    vocab_size: int,
    bos: int = BOS,
    eos: int = EOS,
) -> Path:
    """Write the documents of each split, source and shard, and the manifest; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {
        split: [
            write_one(folder, f"{split}-{number:05d}", source, shard, vocab_size=vocab_size)
            for number, (source, shard) in enumerate(_by_source(sources))
        ]
        for split, sources in splits.items()
    }
    write_manifest(folder, _manifest(infos, {"vocab_size": vocab_size, "bos": bos, "eos": eos}))
    return folder


def write_one(folder: Path, name: str, source: str, shard: Documents, *, vocab_size: int) -> ShardInfo:
    """Write one shard and describe it."""
    files = write_shard(folder / name, map(np.asarray, shard), dtype=token_dtype(vocab_size))
    return ShardInfo(
        name=name,
        source=source,
        sha256_bin=files.sha256_bin,
        sha256_idx=files.sha256_idx,
        documents=files.documents,
        tokens=files.tokens,
        bytes=2 * files.tokens,
    )


def _by_source(sources: Mapping[str, Sequence[Documents]]) -> list[tuple[str, Documents]]:
    return [(source, shard) for source, shards in sources.items() for shard in shards]


def _manifest(infos: Mapping[str, Sequence[ShardInfo]], tokenizer: Mapping[str, int]) -> Manifest:
    identity = {"sha256": "0" * 64, **tokenizer}
    splits = {
        name: SplitInfo(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
        )
        for name, shards in infos.items()
    }
    return Manifest(
        fingerprint=fingerprint_of("config", str(identity["sha256"]), splits),
        config_digest="config",
        source={"kind": "path", "licence": "none"},
        listing=None,
        tokenizer=identity,
        splits=splits,
        sources={},
        quarantined=0,
        stages={},
        logs={},
    )
