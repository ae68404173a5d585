"""Retention: old checkpoints are removed only while a newer one is known to be good."""

from __future__ import annotations

import warnings
from pathlib import Path

from checkpoints.commit import CheckpointWarning, list_steps, remove_checkpoint
from checkpoints.verify import quick_problems, verify_checkpoint
from trellis_dist.files import REAL, FileSystem

__all__ = ["keep_newest"]


def keep_newest(root: Path, keep: int, *, file_system: FileSystem = REAL) -> list[Path]:
    """Remove steps of `root` older than the newest `keep` sound ones; 0 keeps all.

    Before anything goes, one of those kept is read back and verified byte for byte: the only verified
    checkpoint is never removed. A damaged step newer than those kept is left for a person to look at.

    Returns:
        The directories removed, the newest first.

    Raises:
        OSError: a removal failed.
    """
    if keep == 0:
        return []
    steps = list_steps(root)
    sound = [step for step, path in steps.items() if not quick_problems(path)]
    kept = sound[:keep]
    doomed = [path for step, path in steps.items() if kept and step < kept[-1]]
    if not doomed:
        return []
    if not any(not verify_checkpoint(steps[step]) for step in kept):
        text = f"none of the newest {len(kept)} checkpoints in {root} verifies: nothing older is removed"
        warnings.warn(text, CheckpointWarning, stacklevel=2)
        return []
    for path in doomed:
        remove_checkpoint(path, file_system=file_system)
    return doomed
