"""Stage "shards": committed tokens, in corpus order, to Megatron shards; one task per shard.

A shard is a pure function of the documents it takes from token units. Its files have the same names in every
version of a data set, so what is committed is the file ``work/shards/NAME.json``, removed before the shard's
files are touched and written after them: while it is there, the shard is the one of that key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.commit import unit_folder, whole_unit
from data_pipeline.config import CORPUS
from data_pipeline.holdout import SPLITS
from data_pipeline.manifest import SHARD, Manifest, ShardInfo
from data_pipeline.shard import token_dtype, write_shard
from data_pipeline.tokenise import SIZE, SPLIT, TOKENS, read_records
from trellis_dist.files import REAL, digest, read_json, write_json

__all__ = [
    "Part",
    "Plan",
    "Taken",
    "committed_shard",
    "plan_shards",
    "remake_shard",
    "remove_stale",
    "write_planned",
]

VERSION = 1


@dataclass(frozen=True)
class Taken:
    """The first `documents` documents of the token unit in `folder`."""

    folder: Path
    documents: int


@dataclass(frozen=True)
class Part:
    """Documents [start, stop) of one split in a token unit, `offset` tokens into the split's file."""

    unit: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """A shard to be: its documents, in order, and the sums over them."""

    name: str
    source: str
    vocab_size: int
    parts: tuple[Part, ...]
    documents: int
    tokens: int
    bytes: int

    @property
    def key(self) -> str:
        """Hash of all that decides the shard's bytes."""
        return digest([VERSION, str(token_dtype(self.vocab_size)), [asdict(part) for part in self.parts]])


def plan_shards(source: str, taken: Sequence[Taken], *, shard_tokens: int, vocab_size: int) -> list[Plan]:
    """The shards of one source, split after split.

    Args:
        source: its name in the recipe.
        taken: token units in corpus order.
        shard_tokens: a shard is closed before it would hold more (a longer document gets a shard of its own).
        vocab_size: decides the stored dtype.
    """
    plans = []
    for split in SPLITS:
        stem = split if source == CORPUS else f"{split}-{source}"
        for index, parts in enumerate(_groups(split, taken, shard_tokens)):
            documents, tokens, size = (sum(values) for values in zip(*(sums for _, sums in parts)))
            name = f"{stem}-{index:05d}"
            found = tuple(part for part, _ in parts)
            plans.append(Plan(name, source, vocab_size, found, documents, tokens, size))
    return plans


# A part, and its documents, tokens and bytes.
Counted = tuple[Part, tuple[int, int, int]]


def _groups(split: str, taken: Sequence[Taken], most: int) -> Iterator[list[Counted]]:
    """Parts of each shard; a unit is cut where a shard is full."""
    group: list[Counted] = []
    room = most
    for unit in taken:
        records = read_records(unit.folder)[: unit.documents]
        records = records[records[:, SPLIT] == SPLITS.index(split)]
        ends = np.cumsum(records[:, TOKENS])
        start = 0
        while start < len(records):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + room, side="right"))
            if stop == start and not group:
                stop = start + 1
            if stop > start:
                part = Part(unit.folder.name, start, stop, before)
                tokens, size = (int(records[start:stop, column].sum()) for column in (TOKENS, SIZE))
                group.append((part, (stop - start, tokens, size)))
                room -= tokens
            if stop < len(records):
                yield group
                group, room = [], most
            start = stop
    if group:
        yield group


def committed_shard(directory: Path, plan: Plan) -> ShardInfo | None:
    """The shard, if the one that is there is the one planned and its files have their sizes."""
    try:
        entry = read_json(_entry(directory, plan.name))
        info = ShardInfo(**entry["shard"])
        size = (directory / f"{plan.name}.bin").stat().st_size
        index = (directory / f"{plan.name}.idx").stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = size == plan.tokens * token_dtype(plan.vocab_size).itemsize and index == entry["index_bytes"]
    return info if whole and entry["key"] == plan.key else None


def write_planned(plan: Plan, directory: str) -> ShardInfo:
    """Write and commit one shard.

    Raises:
        OSError: the disk is full, ...; nothing is committed then.
    """
    folder = Path(directory)
    entry = _entry(folder, plan.name)
    REAL.unlink(entry)
    REAL.fsync_directory(entry.parent)
    dtype = token_dtype(plan.vocab_size)
    written = write_shard(folder / plan.name, _documents(plan, folder / "work", dtype), dtype=dtype)
    assert (written.documents, written.tokens) == (plan.documents, plan.tokens), (
        f"{plan.name}: {written}, not {plan.documents, plan.tokens}"
    )
    hashes = (written.sha256_bin, written.sha256_idx)
    info = ShardInfo(plan.name, plan.source, *hashes, plan.documents, plan.tokens, plan.bytes)
    size = (folder / f"{plan.name}.idx").stat().st_size
    write_json(entry, {"key": plan.key, "index_bytes": size, "shard": asdict(info), "plan": asdict(plan)})
    return info


def remake_shard(directory: Path, name: str) -> bool:
    """Write a shard again from the committed tokens, without corpus, config or Ray.

    Returns:
        Whether that could be done: its plan is there, and the units it takes are whole.

    Raises:
        OSError: the disk is full, ...
    """
    try:
        fields = read_json(_entry(directory, name))["plan"]
        plan = Plan(**(fields | {"parts": tuple(Part(**part) for part in fields["parts"])}))
        units = {unit_folder(directory / "work", "tokens", part.unit) for part in plan.parts}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # The file says what to write where, and nothing vouches for it.
    if plan.name != name or any(whole_unit(unit) is None for unit in units):
        return False
    write_planned(plan, str(directory))
    return True


def _entry(directory: Path, name: str) -> Path:
    return directory / "work" / "shards" / f"{name}.json"


def _documents(plan: Plan, work: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    split = plan.name.partition("-")[0]
    for part in plan.parts:
        folder = unit_folder(work, "tokens", part.unit)
        records = read_records(folder)
        lengths = records[records[:, SPLIT] == SPLITS.index(split)][part.start : part.stop, TOKENS]
        tokens = np.fromfile(
            folder / f"{split}.tokens", dtype, int(lengths.sum()), offset=part.offset * dtype.itemsize
        )
        for stop, length in zip(np.cumsum(lengths), lengths):
            yield tokens[stop - length : stop]


def remove_stale(directory: Path, manifest: Manifest) -> None:
    """Remove shards and row indexes of an earlier config; only names this package gives are touched."""
    known = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for path in directory.iterdir():
        if SHARD.fullmatch(path.stem) and path.suffix in (".bin", ".idx") and path.stem not in known:
            _entry(directory, path.stem).unlink(missing_ok=True)
            path.unlink()
    for path in (directory / "index").glob("*.rows"):
        if not any(path.name.startswith(f"{name}-") for name in known):
            path.unlink()
