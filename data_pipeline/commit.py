"""Exactly once: a work unit is a pure function, committed under the hash of all that decides its output.

A committed unit is a folder ``work/STAGE/KEY``: its files, and unit.json with a summary and, per file, the
SHA-256. A process killed at any moment leaves a whole folder or none (what it had begun lies in
``work/attempts``, which the next run removes), and whoever makes the unit again, anywhere, at any time, makes
the same bytes. That is all there is to it: no journal, no locks between workers, no clean-up of half a unit.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from trellis_dist.files import REAL, commit_directory, read_json, remove_temporaries, sha256_file, write_json

__all__ = [
    "STAGES",
    "check_key",
    "clear_attempts",
    "commit_unit",
    "read_unit",
    "unit_folder",
    "versions",
    "whole_unit",
]

STAGES = ("fetch", "ngrams", "clean", "exact", "near", "tokenizer", "tokens")
ENTRY, HASHES = "unit.json", "sha256"
KEY = re.compile(r"[0-9a-f]{64}")
TRASH = ".attempts-"


def unit_folder(work: Path | str, stage: str, key: str) -> Path:
    """Where the unit of that key is, or will be. Raises ValueError: the key is no hash."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key of a work unit")
    return Path(work, stage, key)


def versions(*packages: str) -> list[str]:
    """Versions of what decides a unit's output beside our own code; Python's Unicode tables always count."""
    found = [f"Python {sys.version_info[0]}.{sys.version_info[1]}", unicodedata.unidata_version]
    return found + [f"{package} {metadata.version(package)}" for package in packages]


def check_key(own: str, expected: str) -> None:
    """Refuse to make a unit where its address comes out another one than the driver's.

    Raises:
        RuntimeError: this node's packages or code differ.
    """
    if own != expected:
        raise RuntimeError(
            f"node {platform.node()} has another Python, other packages or other code than the driver: give "
            "all nodes of the cluster one environment"
        )


def commit_unit(
    work: Path | str, stage: str, key: str, write: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Make and commit one unit, unless it is committed already.

    Args:
        work: the data set's work folder, shared by all workers.
        stage: one of `STAGES`.
        key: hash of everything that decides the output.
        write: puts the unit's files into the folder it is given and returns the summary (JSON).

    Returns:
        The summary, with ``"sha256"``: file name -> hash.

    Raises:
        OSError: the disk is full, an input vanished, ...; nothing is committed then.
    """
    final = unit_folder(work, stage, key)
    attempt = Path(work, "attempts", f"{key}-{os.getpid()}-{os.urandom(4).hex()}")
    attempt.mkdir(parents=True)
    try:
        summary = write(attempt)
        hashes = {path.name: sha256_file(path) for path in sorted(attempt.iterdir())}
        write_json(attempt / ENTRY, summary | {HASHES: hashes})
        _settle(attempt, final)
    except BaseException:
        REAL.remove_tree(attempt)
        raise
    return read_json(final / ENTRY)  # type: ignore[no-any-return]


def _settle(attempt: Path, final: Path) -> None:
    """Commit, or leave the unit of another worker that was faster: the content is the same.

    Unless that worker's run was killed and its attempt cleared while it still committed: then it is damaged.
    """
    try:
        commit_directory(attempt, final)
    except FileExistsError:
        if read_unit(final) is None:
            commit_directory(attempt, final)
        else:
            REAL.remove_tree(attempt)


def read_unit(folder: Path) -> dict[str, Any] | None:
    """Summary of a committed unit whose files match their hashes; otherwise None, the folder removed.

    Raises:
        OSError: it cannot be read now, which says nothing about what it holds: it stays.
    """
    if not folder.is_dir():
        return None
    entry = whole_unit(folder)
    if entry is None:
        REAL.remove_tree(folder)
    return entry


def whole_unit(folder: Path) -> dict[str, Any] | None:
    """Summary of a committed unit, or None where a file is missing or is not what was committed.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        entry = read_json(folder / ENTRY)
        whole = all(sha256_file(folder / name) == known for name, known in entry[HASHES].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if whole else None


def clear_attempts(work: Path, folders: Iterable[Path] = ()) -> None:
    """Make the work folders; what killed runs left half done goes, what was committed stays.

    A worker that outlived its driver may still be writing: its attempt is moved away whole before anything in
    it is removed, so that it can be committed whole or not at all.

    Args:
        work: the work folder.
        folders: others in which `atomic_write` may have left temporary files.
    """
    work.mkdir(parents=True, exist_ok=True)
    if (work / "attempts").exists():
        REAL.rename(work / "attempts", work / f"{TRASH}{os.getpid()}-{os.urandom(4).hex()}")
    for trash in work.glob(f"{TRASH}*"):
        with contextlib.suppress(OSError):  # someone still writes there: the next run has another try
            REAL.remove_tree(trash)
    for name in ("attempts", "plans", "shards", *STAGES):
        (work / name).mkdir(parents=True, exist_ok=True)
    for folder in (work / "plans", work / "shards", *folders):
        remove_temporaries(folder)
