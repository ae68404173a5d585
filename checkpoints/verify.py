"""Verification: what is wrong with a checkpoint, each finding naming the file."""

from __future__ import annotations

import json
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from checkpoints.commit import CheckpointWarning, list_steps, step_of
from checkpoints.manifest import DIGEST_FILE, MANIFEST_FILE, STATE_FILE, Manifest, load_manifest
from checkpoints.pins import list_pins
from checkpoints.tensor_file import FileRecord, read_header
from trellis_dist.files import sha256_file

__all__ = [
    "check_file",
    "check_header",
    "latest_verified",
    "leftovers",
    "quick_problems",
    "stray_files",
    "verify_checkpoint",
]

HASHERS = 8  # files of one checkpoint hashed at a time, if there are so many cores

# Names beside the steps in a run's folder of checkpoints, and what they are.
LEFTOVERS = {
    re.compile(
        r"\.attempt-step-.+"
    ): "a save that did not finish, or one in progress; the next save clears it",
    re.compile(r"\.removed-step-.+"): "a removal that did not finish; the next save clears it",
    re.compile(
        r"\.removing-step-.+"
    ): "the mark of a removal in progress or killed; the next removal clears it",
    re.compile(r"damaged-step-.+"): "set aside because it was damaged; remove it once you have looked at it",
}


def verify_checkpoint(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint `path`; empty when every byte is as it was saved.

    The manifest is checked against its digest, each file against the manifest (size, SHA-256, and for tensors
    the header), the slices against the shapes of their tensors, and that state.json is an object. Nothing is
    deserialised but JSON. Files that the manifest does not list are no damage: `stray_files` has them.
    """
    return _problems(path, full=True)


def quick_problems(path: Path) -> list[str]:
    """Like `verify_checkpoint` without reading the tensors: manifest, digest, presence and size of files."""
    return _problems(path, full=False)


def latest_verified(root: Path) -> Path | None:
    """The newest step in `root` that verifies, or None; a warning names each damaged one met on the way."""
    for path in list_steps(root).values():
        problems = verify_checkpoint(path)
        if not problems:
            return path
        text = f"{path} is damaged and was passed over: {'; '.join(problems)}"
        warnings.warn(text, CheckpointWarning, stacklevel=2)
    return None


def _problems(path: Path, *, full: bool) -> list[str]:
    try:
        manifest = load_manifest(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    found = []
    if step_of(path) not in (None, manifest.step):
        found.append(f"{path} holds step {manifest.step}: its manifest.json belongs to another step")
    check = partial(_file_problem, path, manifest, full=full)
    if full:  # hashing lets other threads run
        with ThreadPoolExecutor(max(1, min(HASHERS, os.cpu_count() or 1))) as pool:
            problems = list(pool.map(check, manifest.files))
    else:
        problems = [check(name) for name in manifest.files]
    return found + [problem for problem in problems if problem]


def _file_problem(path: Path, manifest: Manifest, name: str, *, full: bool) -> str | None:
    try:
        check_file(path / name, manifest.files[name], hashed=full)
        if full and name.endswith(".safetensors"):
            check_header(path, name, manifest)
        elif full and name == STATE_FILE:
            _check_state(path / name)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def stray_files(path: Path) -> list[str]:
    """One line for each thing in the checkpoint `path` that its manifest does not list; sorted.

    A checkpoint is never written to after its commit, so somebody else put it there. It is never read.

    Raises:
        OSError, ValueError: as `load_manifest`.
    """
    listed = {MANIFEST_FILE, DIGEST_FILE, *load_manifest(path).files}
    found = sorted(item for item in path.iterdir() if item.name not in listed)
    return [f"{item} is not listed in {MANIFEST_FILE}: it is no part of the checkpoint" for item in found]


def leftovers(root: Path) -> list[str]:
    """One line for each thing in a run's folder of checkpoints that is no step, and for each pin; sorted."""
    return [*_remains(root), *_pin_lines(root)]


def _remains(root: Path) -> Iterator[str]:
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        for pattern, meaning in LEFTOVERS.items():
            if pattern.fullmatch(path.name):
                yield f"{path} is {meaning}"


def _pin_lines(root: Path) -> Iterator[str]:
    present = list_steps(root)
    for item in list_pins(root):
        by = f"{item.owner!r} (process {item.pid} on {item.host})"
        hours = max(0.0, (time.time() - item.time) / 3600)
        if item.step not in present:
            yield f"step {item.step} was pinned by {by} and is gone; the next removal clears the pin"
        elif item.expired:
            yield f"step {item.step} was pinned by {by} {hours:.0f} hours ago, which holds no longer"
        else:
            yield f"step {item.step} is kept by a pin of {by}, {hours:.1f} hours old"


def check_file(path: Path, record: FileRecord, *, hashed: bool) -> None:
    """Check that `path` is a plain file with the size (and, with `hashed`, the SHA-256) of `record`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is a link or differs; the message names it.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a plain file: links and devices are refused")
    if status.st_size != record.size:
        raise ValueError(f"{path} is damaged: {status.st_size} bytes where {record.size} were saved")
    if hashed and sha256_file(path) != record.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in the manifest")


def _check_state(path: Path) -> None:
    """Check that the run state is a JSON object. Raises ValueError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is malformed ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")


def check_header(directory: Path, name: str, manifest: Manifest) -> None:
    """Check that tensor file `name` holds the slices that the manifest says it holds. Raises ValueError."""
    header = read_header(directory / name)
    for tensor, part in manifest.slices_by_file.get(name, ()):
        dtype = manifest.tensors[tensor].dtype
        if header.get(part.key) != (dtype, part.box.shape):
            raise ValueError(
                f"{directory / name}: {tensor} should be {dtype} {part.box.shape} under "
                f"{part.key!r}, the file has {header.get(part.key)}"
            )
