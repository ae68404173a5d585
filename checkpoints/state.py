"""Saving a run's state from every rank, and the room's public names for getting it back.

    every rank: rank-XXXXX.safetensors with the slices it owns, rank-XXXXX.json that describes them
    rank 0:     state.json, then manifest and commit once every rank is durable

Ranks learn of each other's failures through `agree`, so a full disk on one of them leaves no other waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from checkpoints.commit import CheckpointWarning, begin_attempt, commit_attempt, find_attempt, step_name
from checkpoints.logical import LogicalTensor
from checkpoints.manifest import STATE_FILE, RankPart, TensorRecord, TensorSlice, assemble, rank_files
from checkpoints.reader import CheckpointReader, load_run_state
from checkpoints.retention import keep_newest
from checkpoints.tensor_file import Entry, FileRecord, dtype_name, write_tensors
from checkpoints.verify import latest_verified, verify_checkpoint
from trellis_dist.files import REAL, FileSystem, canonical_json, sha256_file

__all__ = [
    "CheckpointReader",
    "SaveError",
    "latest_verified",
    "load_run_state",
    "save_checkpoint",
    "verify_checkpoint",
]

Agree = Callable[[bool], bool]
Result = TypeVar("Result")


class SaveError(OSError):
    """A checkpoint was not saved; earlier ones are intact. On the rank that failed the cause is chained."""


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Iterable[LogicalTensor],
    run_state: Mapping[str, Any],
    rank: int = 0,
    world_size: int = 1,
    agree: Agree | None = None,
    keep: int = 0,
    file_system: FileSystem = REAL,
) -> Path:
    """Save one step into `root/step-XXXXXXXX`; every rank calls this with the slices it owns.

    Args:
        root: folder of the run's checkpoints, shared by all ranks.
        step: optimizer step, 0 or more.
        tensors: this rank's slices; those of all ranks must tile each tensor. Read during the call.
        run_state: JSON state; rank 0's is saved.
        rank, world_size: this rank and how many there are.
        agree: a collective that returns True on every rank when every rank passed True, False on every rank
            otherwise (an all-reduce with minimum). Needed when world_size > 1. Called three times per save.
        keep: newest checkpoints kept after this one is in; 0 keeps all.
        file_system: replaced by tests.

    Returns:
        The committed directory, on every rank. A step that was there already and verifies is kept as it is.

    Raises:
        SaveError: on every rank, when any of them failed; nothing was committed, the attempt is removed.
        ValueError: world_size > 1 without `agree`, or a rank outside it.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: use 0 to {world_size - 1}")
    if agree is None and world_size > 1:
        raise ValueError(f"world_size = {world_size} needs `agree`: an all-reduce of success over the ranks")
    save = _Save(Path(root), step, rank, world_size, agree or bool, file_system)
    final = save.run(tensors, run_state)
    if rank == 0:
        _retain(save.root, keep, file_system)
    return final


class _Save:
    """One save on one rank: three phases, after each of which the ranks agree to go on."""

    def __init__(
        self, root: Path, step: int, rank: int, world_size: int, agree: Agree, file_system: FileSystem
    ) -> None:
        self.root, self.step, self.rank, self.world_size = root, step, rank, world_size
        self.agree, self.file_system = agree, file_system
        self.final = root / step_name(step)
        self.attempt: Path | None = None

    def run(self, tensors: Iterable[LogicalTensor], run_state: Mapping[str, Any]) -> Path:
        # Collected before the first phase can fail: making the slices may itself need every rank.
        slices = list(tensors)
        self._together("start", self._begin)
        self._together("write", lambda: self._write(slices, run_state))
        self._together("commit", self._commit)
        return self.final

    def _together(self, phase: str, work: Callable[[], None]) -> None:
        """Do this rank's share of `phase`; go on only if every rank could."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        if self.agree(failure is None):
            return
        self._drop_attempt()
        reason = f"rank {self.rank}: {failure}" if failure else "another rank failed, and says why"
        text = f"checkpoint of step {self.step} not saved ({phase}: {reason}); earlier ones are intact"
        raise SaveError(text) from failure

    def _begin(self) -> None:
        if self.rank == 0:
            self.attempt = begin_attempt(self.root, self.step, file_system=self.file_system)

    def _write(self, slices: list[LogicalTensor], run_state: Mapping[str, Any]) -> None:
        attempt = self.attempt or find_attempt(self.root, self.step)
        part = write_rank(attempt, slices, rank=self.rank, file_system=self.file_system)
        self._write_json(attempt / rank_files(self.rank)[1], part.to_json())
        if self.rank == 0:
            self._write_json(attempt / STATE_FILE, dict(run_state))

    def _commit(self) -> None:
        if self.attempt is None:
            return
        state = self.attempt / STATE_FILE
        record = FileRecord(state.stat().st_size, sha256_file(state))
        manifest = assemble(self.attempt, step=self.step, world_size=self.world_size, state=record)
        commit_attempt(self.attempt, manifest, file_system=self.file_system, problems=verify_checkpoint)

    def _write_json(self, path: Path, value: object) -> None:
        self.file_system.write(path, [canonical_json(value).encode()])
        self.file_system.fsync_file(path)

    def _drop_attempt(self) -> None:
        if self.attempt is None:
            return
        try:
            self.file_system.remove_tree(self.attempt)
        except OSError as error:  # the next save tries again
            text = f"{self.attempt} could not be removed: {error}"
            warnings.warn(text, CheckpointWarning, stacklevel=2)


def write_rank(
    attempt: Path, slices: Iterable[LogicalTensor], *, rank: int, file_system: FileSystem
) -> RankPart:
    """Write one rank's slices to its tensor file in `attempt`, durably; returns their description.

    Raises:
        ValueError: the same box twice, one name with two shapes or types, a dtype that cannot be saved.
        OSError: the file could not be written.
    """
    file = rank_files(rank)[0]
    entries: dict[str, Entry] = {}
    tensors: dict[str, TensorRecord] = {}
    for item in slices:
        dtype, shape = dtype_name(item.local.dtype), tuple(item.global_shape)
        known = tensors.get(item.name, TensorRecord(dtype, shape, ()))
        if (known.dtype, known.shape) != (dtype, shape):
            raise ValueError(
                f"tensor {item.name} was handed over as {known.dtype} {known.shape} and {dtype} {shape}"
            )
        key = f"{item.name}@{','.join(map(str, item.offset))}"
        if item.box.volume:  # an empty fragment says nothing; the tensor is recorded all the same
            if key in entries:
                raise ValueError(f"tensor {item.name}: the slice at {item.offset} was handed over twice")
            entries[key] = Entry(key, dtype, item.box.shape, item.local.detach)
            known = TensorRecord(dtype, shape, (*known.slices, TensorSlice(file, key, item.box)))
        tensors[item.name] = known
    record = write_tensors(attempt / file, list(entries.values()), file_system=file_system)
    return RankPart({file: record}, tensors)


def _retain(root: Path, keep: int, file_system: FileSystem) -> None:
    """The new step is in; failing to remove an old one must not turn that into an error."""
    try:
        keep_newest(root, keep, file_system=file_system)
    except OSError as error:
        text = f"an old checkpoint in {root} could not be removed: {error}"
        warnings.warn(text, CheckpointWarning, stacklevel=3)
