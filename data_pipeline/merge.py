"""Committed work units, in corpus order, to Megatron shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest, ShardInfo, SplitInfo
from data_pipeline.shard import token_dtype, write_shard
from data_pipeline.unit import SPLITS

__all__ = ["Merged", "enough", "merge_units", "remove_stale_shards"]

Record = list[Any]  # [split, tokens, bytes, source], as in unit.json


@dataclass(frozen=True)
class Merged:
    """The written splits, and documents, tokens and bytes per source label."""

    splits: dict[str, SplitInfo]
    sources: dict[str, dict[str, int]]


def enough(entries: Sequence[dict[str, Any] | None], limit: int | None) -> int | None:
    """How many leading units hold `limit` documents; None while they do not, or where there is no limit."""
    documents = 0
    for index, entry in enumerate(entries):
        if entry is None or limit is None:
            return None
        documents += len(entry["documents"])
        if documents >= limit:
            return index + 1
    return None


def merge_units(
    directory: Path,
    folders: Sequence[Path],
    entries: Sequence[dict[str, Any]],
    *,
    limit: int | None,
    shard_tokens: int,
    vocab_size: int,
) -> Merged:
    """Write both splits' shards to `directory`.

    Args:
        directory: where the shards go; shards of the same name are replaced.
        folders, entries: committed units (unit.py) in corpus order.
        limit: documents taken, both splits together; None takes all.
        shard_tokens: a shard is closed before it would hold more (a longer document gets a shard of its own).
        vocab_size: decides the stored dtype.

    Raises:
        ValueError: a split is left without documents.
    """
    taken = _take(entries, limit)
    dtype = token_dtype(vocab_size)
    splits = {}
    for split in SPLITS:
        records = [record for unit in taken for record in unit if record[0] == split]
        if not records:
            raise ValueError(
                f"no document fell in the {split} split ({sum(map(len, taken))} documents in all): use more "
                "documents or a larger data.validation_fraction"
            )
        tokens = _documents(folders, taken, split, dtype)
        shards = tuple(_write(directory, split, tokens, records, dtype=dtype, shard_tokens=shard_tokens))
        splits[split] = SplitInfo(*_sums(records), shards)
    return Merged(splits, _by_source(taken))


def _take(entries: Sequence[dict[str, Any]], limit: int | None) -> list[list[Record]]:
    taken = []
    for entry in entries:
        records = entry["documents"] if limit is None else entry["documents"][:limit]
        limit = None if limit is None else limit - len(records)
        taken.append(records)
    return taken


def _documents(
    folders: Sequence[Path], taken: Sequence[list[Record]], split: str, dtype: np.dtype
) -> Iterator[np.ndarray]:
    for folder, records in zip(folders, taken, strict=True):
        tokens = np.fromfile(folder / f"{split}.tokens", dtype=dtype)
        start = 0
        for record in records:
            if record[0] == split:
                yield tokens[start : start + record[1]]
                start += record[1]


def _write(
    directory: Path,
    split: str,
    tokens: Iterator[np.ndarray],
    records: Sequence[Record],
    *,
    dtype: np.dtype,
    shard_tokens: int,
) -> Iterator[ShardInfo]:
    for index, group in enumerate(_groups(records, shard_tokens)):
        name = f"{split}-{index:05d}"
        documents = (next(tokens) for _ in group)
        written = write_shard(directory / name, documents, dtype=dtype)
        _, count, size = _sums(group)
        assert written.tokens == count, f"{name}: {written.tokens} tokens written, {count} counted"
        yield ShardInfo(name, written.sha256_bin, written.sha256_idx, len(group), count, size)


def _groups(records: Sequence[Record], shard_tokens: int) -> Iterator[Sequence[Record]]:
    first = tokens = 0
    for index, record in enumerate(records):
        if index > first and tokens + record[1] > shard_tokens:
            yield records[first:index]
            first, tokens = index, 0
        tokens += record[1]
    yield records[first:]


def _sums(records: Sequence[Record]) -> tuple[int, int, int]:
    """Documents, tokens, bytes."""
    return len(records), sum(record[1] for record in records), sum(record[2] for record in records)


def _by_source(taken: Sequence[list[Record]]) -> dict[str, dict[str, int]]:
    sources: dict[str, dict[str, int]] = {}
    for _, tokens, size, source in (record for records in taken for record in records):
        sums = sources.setdefault(source, {"documents": 0, "tokens": 0, "bytes": 0})
        sums["documents"] += 1
        sums["tokens"] += tokens
        sums["bytes"] += size
    return sources


def remove_stale_shards(directory: Path, manifest: Manifest) -> None:
    """Remove shards that an earlier config left behind; only names this package gives are touched."""
    known = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for path in directory.iterdir():
        if re.fullmatch(r"(train|validation)-\d{5}\.(bin|idx)", path.name) and path.stem not in known:
            path.unlink()
