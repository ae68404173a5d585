"""Verification: what is wrong with a checkpoint, each finding naming the file."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

from checkpoints.commit import CheckpointWarning, list_steps, step_of
from checkpoints.manifest import Manifest, load_manifest
from checkpoints.tensor_file import FileRecord, read_header
from trellis_dist.files import sha256_file

__all__ = ["check_file", "check_header", "latest_verified", "quick_problems", "verify_checkpoint"]


def verify_checkpoint(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint `path`; empty when every byte is as it was saved.

    The manifest is checked against its digest, each file against the manifest (size, SHA-256, and for tensors
    the header), and the slices against the shapes of their tensors. Nothing is deserialised but JSON.
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
    for name, record in manifest.files.items():
        try:
            check_file(path / name, record, hashed=full)
            if full and name.endswith(".safetensors"):
                check_header(path, name, manifest)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


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


def check_header(directory: Path, name: str, manifest: Manifest) -> None:
    """Check that tensor file `name` holds the slices that the manifest says it holds. Raises ValueError."""
    header = read_header(directory / name)
    for tensor, record in manifest.tensors.items():
        for part in record.slices:
            if part.file == name and header.get(part.key) != (record.dtype, part.box.shape):
                raise ValueError(
                    f"{directory / name}: {tensor} should be {record.dtype} {part.box.shape} under "
                    f"{part.key!r}, the file has {header.get(part.key)}"
                )
