"""One rank's share of a save: begin, write, commit. Who waits for whom is its caller's business.

every rank: rank-XXXXX.safetensors (and -NNN, one after the other) with the slices it owns,
            then rank-XXXXX.json that describes them: once it is there, the rank's share is durable
rank 0:     state.json, and manifest and commit once every rank's description is there
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoints.commit import CheckpointWarning, begin_attempt, commit_attempt, step_name
from checkpoints.logical import LogicalTensor
from checkpoints.manifest import (
    STATE_FILE,
    RankPart,
    TensorRecord,
    TensorSlice,
    assemble,
    description_file,
    tensor_file,
)
from checkpoints.tensor_file import Entry, FileRecord, dtype_name, write_tensors
from checkpoints.verify import verify_checkpoint
from trellis_dist.files import FileSystem, canonical_json, sha256_file

__all__ = ["RankSave", "SaveError", "write_rank"]

# A rank's slices are cut into about so many files, each of at least so many bytes: while some are hashed,
# others are written or wait for the disk.
FILES = 48
FILE_BYTES = 32 << 20
WRITERS = 8
RETRY_S = 0.1


class SaveError(OSError):
    """A checkpoint was not saved; earlier ones are intact. On the rank that failed the cause is chained."""


class RankSave:
    """The files of one rank in one attempt at saving a step."""

    def __init__(self, root: Path, step: int, *, rank: int, world_size: int, file_system: FileSystem) -> None:
        """Of ``world_size`` ranks this is ``rank``; nothing is touched yet."""
        self.root, self.step, self.rank, self.world_size = root, step, rank, world_size
        self.file_system = file_system
        self.final = root / step_name(step)

    def begin(self, name: str | None = None) -> Path:
        """Clear what dead saves left and make the attempt's directory (of this name); rank 0 calls it."""
        return begin_attempt(self.root, self.step, file_system=self.file_system, name=name)

    def write(
        self,
        attempt: Path,
        slices: Iterable[LogicalTensor],
        run_state: Mapping[str, Any],
        *,
        proceed: Callable[[], None] | None = None,
    ) -> int:
        """Write this rank's files durably, its description last; returns the bytes of its tensors.

        Args:
            attempt: the directory that rank 0 made.
            slices: what this rank owns; on rank 0 `run_state` is written too.
            run_state: JSON state.
            proceed: called before each piece of a file; what it raises ends the write.

        Raises:
            ValueError: slices that cannot be saved (see `write_rank`), or a state that is no JSON.
            OSError: a file could not be written.
        """
        part = write_rank(attempt, slices, rank=self.rank, file_system=self.file_system, proceed=proceed)
        if self.rank == 0:
            self._publish(attempt / STATE_FILE, dict(run_state))
        self._publish(attempt / description_file(self.rank), part.to_json())
        return sum(record.size for record in part.files.values())

    def ready(self, attempt: Path) -> bool:
        """Whether every rank's share is durable in ``attempt``."""
        present = set(os.listdir(attempt))
        return all(description_file(rank) in present for rank in range(self.world_size))

    def commit(self, attempt: Path) -> Path:
        """Put the ranks' descriptions together and give the attempt its name; rank 0 calls it, at the end.

        Raises:
            ValueError: slices that do not make whole tensors.
            OSError: nothing was committed.
        """
        state = attempt / STATE_FILE
        record = FileRecord(state.stat().st_size, sha256_file(state))
        manifest = assemble(attempt, step=self.step, world_size=self.world_size, state=record)
        return commit_attempt(attempt, manifest, file_system=self.file_system, problems=verify_checkpoint)

    def drop(self, attempt: Path, *, patience: float = 0.0) -> None:
        """Remove a failed attempt; one that resists is left to the next save, with a warning.

        For `patience` seconds it is tried again: another rank may still be adding a file.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self.file_system.remove_tree(attempt)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    text = f"{attempt} could not be removed: {error}"
                    warnings.warn(text, CheckpointWarning, stacklevel=2)
                    return
                time.sleep(RETRY_S)

    def _publish(self, path: Path, value: object) -> None:
        """Let `path` appear, whole and durable, as the last thing that can fail: rank 0 may commit at once.

        (The rename itself is made durable with the whole directory, before that gets its name.)
        """
        hidden = path.with_name(f".{path.name}.tmp")
        self.file_system.write(hidden, [canonical_json(value).encode()])
        self.file_system.fsync_file(hidden)
        self.file_system.fsync_directory(path.parent)
        self.file_system.rename(hidden, path)


def write_rank(
    attempt: Path,
    slices: Iterable[LogicalTensor],
    *,
    rank: int,
    file_system: FileSystem,
    proceed: Callable[[], None] | None = None,
) -> RankPart:
    """Write one rank's slices to its tensor files in `attempt`, durably; returns their description.

    Raises:
        ValueError: the same box twice, one name with two shapes or types, a dtype that cannot be saved.
        OSError: a file could not be written.
    """
    entries: dict[str, Entry] = {}
    owners: dict[str, list[tuple[str, LogicalTensor]]] = {}
    heads: dict[str, tuple[str, tuple[int, ...]]] = {}
    for item in slices:
        head = (dtype_name(item.local.dtype), tuple(item.global_shape))
        if heads.setdefault(item.name, head) != head:
            before = heads[item.name]
            raise ValueError(
                f"tensor {item.name} was handed over as {before[0]} {before[1]} and {head[0]} {head[1]}"
            )
        parts = owners.setdefault(item.name, [])
        if not item.box.volume:  # an empty fragment says nothing; the tensor is recorded all the same
            continue
        key = f"{item.name}@{','.join(map(str, item.offset))}"
        if key in entries:
            raise ValueError(f"tensor {item.name}: the slice at {item.offset} was handed over twice")
        entries[key] = Entry(key, head[0], item.box.shape, item.local.detach)
        parts.append((key, item))
    groups = _in_files(list(entries.values()), rank)
    places = {entry.key: name for name, group in groups.items() for entry in group}
    tensors = {
        name: TensorRecord(*heads[name], tuple(TensorSlice(places[key], key, x.box) for key, x in parts))
        for name, parts in owners.items()
    }
    return RankPart(_write_files(attempt, groups, file_system, proceed), tensors)


def _in_files(entries: Sequence[Entry], rank: int) -> dict[str, list[Entry]]:
    """File name -> entries, in order; a file is larger than its share only where one entry is."""
    share = max(FILE_BYTES, sum(entry.size for entry in entries) // FILES)
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.size > share:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size
    return {tensor_file(rank, index): group for index, group in enumerate(groups)}


def _write_files(
    attempt: Path,
    groups: Mapping[str, Sequence[Entry]],
    file_system: FileSystem,
    proceed: Callable[[], None] | None,
) -> dict[str, FileRecord]:
    """Write the files, a few at a time: hashing and writing both let other threads run."""

    def write(name: str) -> FileRecord:
        return write_tensors(attempt / name, groups[name], file_system=file_system, proceed=proceed)

    if len(groups) == 1:
        return {name: write(name) for name in groups}
    # More than there may be cores: while one waits for the disk, another hashes.
    with ThreadPoolExecutor(min(WRITERS, len(groups)), thread_name_prefix="checkpoint-write") as pool:
        return dict(zip(groups, pool.map(write, groups), strict=True))
