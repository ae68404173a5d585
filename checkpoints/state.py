"""Saving a run's state from every rank at once, and the room's public names for getting it back.

Ranks learn of each other's failures through `agree`, so a full disk on one of them leaves no other waiting.
A save that training does not wait for is in background.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.commit import CheckpointWarning, find_attempt
from checkpoints.logical import LogicalTensor
from checkpoints.reader import CheckpointReader, load_run_state
from checkpoints.retention import Retention, retain
from checkpoints.save import RankSave, SaveError
from checkpoints.verify import latest_verified, verify_checkpoint
from trellis_dist.files import REAL, FileSystem

__all__ = [
    "CheckpointReader",
    "SaveError",
    "latest_verified",
    "load_run_state",
    "save_checkpoint",
    "verify_checkpoint",
]

Agree = Callable[[bool], bool]


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
    # Collected before the first phase can fail: making the slices may itself need every rank.
    slices = list(tensors)
    save = RankSave(Path(root), step, rank=rank, world_size=world_size, file_system=file_system)
    final = _Phases(save, agree or bool).run(slices, run_state)
    if rank == 0:
        _retain(save.root, keep, file_system)
    return final


class _Phases:
    """The three phases of a save, after each of which the ranks agree to go on."""

    def __init__(self, save: RankSave, agree: Agree) -> None:
        self._save, self._agree = save, agree
        self._attempt: Path | None = None

    def run(self, slices: list[LogicalTensor], run_state: Mapping[str, Any]) -> Path:
        self._together("start", self._begin)
        self._together("write", lambda: self._write(slices, run_state))
        self._together("commit", self._commit)
        return self._save.final

    def _together(self, phase: str, work: Callable[[], None]) -> None:
        """Do this rank's share of `phase`; go on only if every rank could."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:
            failure = error
        if self._agree(failure is None):
            return
        if self._save.rank == 0 and self._attempt is not None:
            self._save.drop(self._attempt)
        reason = f"rank {self._save.rank}: {failure}" if failure else "another rank failed, and says why"
        text = f"checkpoint of step {self._save.step} not saved ({phase}: {reason}); earlier ones are intact"
        raise SaveError(text) from failure

    def _begin(self) -> None:
        if self._save.rank == 0:
            self._attempt = self._save.begin()

    def _write(self, slices: list[LogicalTensor], run_state: Mapping[str, Any]) -> None:
        if self._attempt is None:
            self._attempt = find_attempt(self._save.root, self._save.step)
        self._save.write(self._attempt, slices, run_state)

    def _commit(self) -> None:
        if self._save.rank == 0 and self._attempt is not None:
            self._save.commit(self._attempt)


def _retain(root: Path, keep: int, file_system: FileSystem) -> None:
    """The new step is in; failing to remove an old one must not turn that into an error."""
    try:
        retain(root, Retention(last=keep), file_system=file_system)
    except OSError as error:
        text = f"an old checkpoint in {root} could not be removed: {error}"
        warnings.warn(text, CheckpointWarning, stacklevel=3)
