"""The commit protocol: a step exists completely or not at all, whenever the machine stops.

    unique attempt directory -> every file written and fsynced -> manifest.json and manifest.sha256, fsynced
    -> rename to step-XXXXXXXX -> fsync of the parent

A step is never overwritten. Removing one unlinks its manifest first, so that what is left cannot be loaded.
"""

from __future__ import annotations

import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from checkpoints.manifest import DIGEST_FILE, MANIFEST_FILE, Manifest, digest_line
from trellis_dist.files import FileSystem, commit_directory, make_directories

__all__ = [
    "CheckpointWarning",
    "attempt_name",
    "begin_attempt",
    "commit_attempt",
    "find_attempt",
    "list_steps",
    "process_name",
    "remove_checkpoint",
    "remove_leftovers",
    "step_name",
    "step_of",
]

STEP = re.compile(r"step-([0-9]{8,})")
ATTEMPT = re.compile(r"\.attempt-step-([0-9]{8,})-(.+)-([0-9]+)-([0-9a-f]{8})-[0-9a-f]{8}")
REMOVED = re.compile(r"\.removed-step-[0-9]{8,}-[0-9a-f]{8}")
# Tells this process from an earlier one that had the same host name and process id (containers).
PROCESS = os.urandom(4).hex()
FOREIGN_AGE = 24 * 3600.0  # seconds after which another host's attempt is taken for dead


class CheckpointWarning(RuntimeWarning):
    """Something is wrong with a checkpoint, or was put right; the text names it."""


def step_name(step: int) -> str:
    """Directory name of a step. Raises ValueError for a negative one."""
    if step < 0:
        raise ValueError(f"step {step}: use 0 or more")
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step whose name `path` has, or None for any other name."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match and step_name(int(match[1])) == path.name else None


def list_steps(root: Path) -> dict[int, Path]:
    """Step -> directory of everything in `root` that has a step's name, the newest first; unverified."""
    found = {}
    for path in root.iterdir() if root.is_dir() else ():
        step = step_of(path)
        if step is not None and path.is_dir():
            found[step] = path
    return dict(sorted(found.items(), reverse=True))


def process_name() -> str:
    """What tells this process from all others in the names of attempts: host, process id, a drawn token."""
    return f"{_host()}-{os.getpid()}-{PROCESS}"


def attempt_name(step: int, *, process: str | None = None, number: int | None = None) -> str:
    """Name of an attempt at `step`.

    Args:
        step: the step to be saved.
        process: `process_name` of rank 0, whose attempt it is; this process unless given.
        number: tells apart the attempts of one process, 0 to 2^32 - 1; drawn unless given.
    """
    last = os.urandom(4).hex() if number is None else f"{number:08x}"
    return f".attempt-{step_name(step)}-{process or process_name()}-{last}"


def begin_attempt(root: Path, step: int, *, file_system: FileSystem, name: str | None = None) -> Path:
    """Clear what dead processes left in `root` and create the directory this save is written into.

    Args:
        root: folder of the checkpoints; made if it is not there.
        step: the step to be saved.
        file_system: what does the work.
        name: of the directory, an `attempt_name`; drawn unless given.

    Raises:
        OSError: the directory cannot be made.
    """
    make_directories(root, file_system=file_system)
    remove_leftovers(root, step=step, file_system=file_system)
    attempt = root / (name or attempt_name(step))
    file_system.make_directory(attempt)
    return attempt


def find_attempt(root: Path, step: int, *, timeout: float = 10.0) -> Path:
    """The attempt directory rank 0 made for `step`, as another rank sees it.

    A network file system may show it late, so this looks for up to `timeout` seconds.

    Raises:
        OSError: there is not exactly one.
    """
    deadline = time.monotonic() + timeout
    while True:
        found = [path for path, match in _attempts(root) if int(match[1]) == step]
        if len(found) == 1:
            return found[0]
        if time.monotonic() > deadline:
            raise OSError(
                f"{root} holds {len(found)} attempts at {step_name(step)}, not 1: "
                "all ranks must share this folder, and no other job may save into it"
            )
        time.sleep(0.05)


def commit_attempt(
    attempt: Path, manifest: Manifest, *, file_system: FileSystem, problems: Callable[[Path], list[str]]
) -> Path:
    """Write the manifest and its digest, and give the attempt its final name.

    A step that is there already and shows no `problems` is kept and the attempt dropped; a damaged one is set
    aside under another name. Both are said in a `CheckpointWarning`.

    Raises:
        OSError: nothing was committed.
    """
    data = manifest.to_bytes()
    for name, content in ((MANIFEST_FILE, data), (DIGEST_FILE, digest_line(data))):
        file_system.write(attempt / name, [content])
        file_system.fsync_file(attempt / name)
    final = attempt.parent / step_name(manifest.step)
    if final.exists():
        found = problems(final)
        if not found:
            file_system.remove_tree(attempt)
            _warn(f"{final} exists already and verifies: it is kept, and the new attempt at it was dropped")
            return final
        aside = final.with_name(f"damaged-{final.name}-{os.urandom(4).hex()}")
        file_system.rename(final, aside)
        _warn(f"{final} was damaged ({found[0]}): set aside as {aside.name} and saved again")
    commit_directory(attempt, final, file_system=file_system)
    return final


def remove_checkpoint(path: Path, *, file_system: FileSystem) -> None:
    """Remove a committed step, its manifest first: a removal that is interrupted leaves nothing loadable.

    Raises:
        OSError: as the file system raises it.
    """
    file_system.unlink(path / MANIFEST_FILE)
    file_system.fsync_directory(path)
    removed = path.with_name(f".removed-{path.name}-{os.urandom(4).hex()}")
    file_system.rename(path, removed)
    file_system.remove_tree(removed)


def remove_leftovers(root: Path, *, step: int, file_system: FileSystem) -> None:
    """Remove what interrupted saves and removals left in `root`.

    An attempt by a living process is left alone, unless it is at `step`, which is about to be saved.

    Raises:
        OSError: as the file system raises it.
    """
    for path, match in _attempts(root):
        # The same step: the newest save wins, and one by a forgotten process fails for want of its folder.
        if int(match[1]) == step or not _in_flight(path, match):
            file_system.remove_tree(path)
    for path in root.iterdir():
        if REMOVED.fullmatch(path.name):
            file_system.remove_tree(path)


def _attempts(root: Path) -> list[tuple[Path, re.Match[str]]]:
    pairs = [(path, ATTEMPT.fullmatch(path.name)) for path in root.iterdir()]
    return [(path, match) for path, match in pairs if match]


def _in_flight(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that made the attempt `path` may still be writing into it."""
    host, process, token = match[2], int(match[3]), match[4]
    if host != _host():
        return time.time() - path.stat().st_mtime < FOREIGN_AGE
    return token == PROCESS if process == os.getpid() else _alive(process)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user, and lives
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"


def _warn(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=3)
