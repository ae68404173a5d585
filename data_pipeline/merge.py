"""Committed work units, in corpus order, to Megatron shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import CORPUS
from data_pipeline.manifest import SHARD, Manifest, ShardInfo, SplitInfo
from data_pipeline.shard import token_dtype, write_shard
from data_pipeline.unit import LABEL, SIZE, SPLIT, SPLITS, TOKENS, read_records
from trellis_dist.files import read_json

__all__ = ["Merged", "enough", "merge_units", "remove_stale_shards"]

# Folder and records (unit.py) of each unit; read anew by every pass, so that one unit is in memory at a time.
Units = Callable[[], Iterator[tuple[Path, np.ndarray]]]


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
        documents += entry["documents"]
        if documents >= limit:
            return index + 1
    return None


def merge_units(
    directory: Path, folders: Sequence[Path], *, limit: int | None, shard_tokens: int, vocab_size: int
) -> Merged:
    """Write both splits' shards to `directory`.

    Args:
        directory: where the shards go; shards of the same name are replaced.
        folders: committed units (unit.py) in corpus order.
        limit: documents taken, both splits together; None takes all.
        shard_tokens: a shard is closed before it would hold more (a longer document gets a shard of its own).
        vocab_size: decides the stored dtype.

    Raises:
        ValueError: a split is left without documents.
    """
    units = partial(_units, folders, limit)
    splits = {}
    for split in SPLITS:
        shards = tuple(_write(directory, split, units, dtype=token_dtype(vocab_size), most=shard_tokens))
        if not shards:
            count = sum(len(records) for _, records in units())
            raise ValueError(
                f"no document fell in the {split} split ({count} documents in all): use more documents or a "
                "larger data.validation_fraction"
            )
        splits[split] = SplitInfo(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=shards,
        )
    return Merged(splits, _by_source(units))


def _units(folders: Sequence[Path], limit: int | None) -> Iterator[tuple[Path, np.ndarray]]:
    for folder in folders:
        records = read_records(folder)[:limit]
        limit = None if limit is None else limit - len(records)
        yield folder, records


def _write(directory: Path, split: str, units: Units, *, dtype: np.dtype, most: int) -> Iterator[ShardInfo]:
    documents = _documents(units, split, dtype)
    for index, (count, tokens, size) in enumerate(_groups(units, split, most)):
        name = f"{split}-{index:05d}"
        written = write_shard(directory / name, islice(documents, count), dtype=dtype)
        assert (written.documents, written.tokens) == (count, tokens), (
            f"{name}: {written}, not {count, tokens}"
        )
        yield ShardInfo(name, CORPUS, written.sha256_bin, written.sha256_idx, count, tokens, size)


def _documents(units: Units, split: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Tokens of the split's documents."""
    for folder, records in units():
        tokens = np.fromfile(folder / f"{split}.tokens", dtype=dtype)
        lengths = records[records[:, SPLIT] == SPLITS.index(split), TOKENS]
        for stop, length in zip(np.cumsum(lengths), lengths):
            yield tokens[stop - length : stop]


def _groups(units: Units, split: str, most: int) -> Iterator[tuple[int, int, int]]:
    """(documents, tokens, bytes) of each shard."""
    count = tokens = size = 0
    for _, records in units():
        for length, more in records[records[:, SPLIT] == SPLITS.index(split)][:, [TOKENS, SIZE]].tolist():
            if count and tokens + length > most:
                yield count, tokens, size
                count = tokens = size = 0
            count, tokens, size = count + 1, tokens + length, size + more
    if count:
        yield count, tokens, size


def _by_source(units: Units) -> dict[str, dict[str, int]]:
    sources: dict[str, dict[str, int]] = {}
    for folder, records in units():
        for label, source in enumerate(read_json(folder / "unit.json")["labels"]):
            chosen = records[records[:, LABEL] == label]
            if len(chosen):
                sums = sources.setdefault(source, {"documents": 0, "tokens": 0, "bytes": 0})
                sums["documents"] += len(chosen)
                sums["tokens"] += int(chosen[:, TOKENS].sum())
                sums["bytes"] += int(chosen[:, SIZE].sum())
    return sources


def remove_stale_shards(directory: Path, manifest: Manifest) -> None:
    """Remove shards that an earlier config left behind; only names this package gives are touched."""
    known = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for path in directory.iterdir():
        if SHARD.fullmatch(path.stem) and path.suffix in (".bin", ".idx") and path.stem not in known:
            path.unlink()
