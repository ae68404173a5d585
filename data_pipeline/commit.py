"""Exactly once: a work unit is a pure function, committed under the hash of all that decides its output.

A committed unit is a folder ``work/STAGE/KEY``: its files, and unit.json with a summary and, per file, the
SHA-256. A process killed at any moment leaves a whole folder or none (what it had begun lies in
``work/attempts``, which the next run removes), and whoever makes the unit again, anywhere, at any time, makes
the same bytes. That is all there is to it: no journal, no locks between workers, no clean-up of half a unit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trellis_dist.files import REAL, commit_directory, read_json, remove_temporaries, sha256_file, write_json

__all__ = ["STAGES", "clear_attempts", "commit_unit", "read_unit", "read_units", "unit_folder"]

STAGES = ("fetch", "clean", "exact", "near", "tokens")
ENTRY, HASHES = "unit.json", "sha256"


def unit_folder(work: Path | str, stage: str, key: str) -> Path:
    """Where the unit of that key is, or will be."""
    return Path(work, stage, key)


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
    """Summary of a committed unit whose files match their hashes; otherwise None, the folder removed."""
    if not folder.is_dir():
        return None
    try:
        entry = read_json(folder / ENTRY)
        if all(sha256_file(folder / name) == known for name, known in entry[HASHES].items()):
            return entry  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    REAL.remove_tree(folder)
    return None


def read_units(folders: Sequence[Path], *, threads: int) -> list[dict[str, Any] | None]:
    """`read_unit` of each; hashing leaves the interpreter's lock, so threads share the work."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(read_unit, folders))


def clear_attempts(work: Path, folders: Iterable[Path] = ()) -> None:
    """Make the work folders; what killed runs left half done goes, what was committed stays.

    Args:
        work: the work folder, nobody working in it.
        folders: others in which `atomic_write` may have left temporary files.
    """
    REAL.remove_tree(work / "attempts")
    for name in ("attempts", "tokenizers", "plans", "shards", *STAGES):
        (work / name).mkdir(parents=True, exist_ok=True)
    for folder in (work / "tokenizers", work / "plans", work / "shards", *folders):
        remove_temporaries(folder)
