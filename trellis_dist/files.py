"""Files that survive: write, fsync, rename; canonical JSON; hashing.

Every room writes through these functions, so that a process killed at any moment leaves either the old file
or the new one, never half of one. The file system must have an atomic rename and a working fsync.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = [
    "REAL",
    "Disk",
    "FileSystem",
    "Piece",
    "atomic_write",
    "canonical_json",
    "commit_directory",
    "digest",
    "make_directories",
    "read_json",
    "remove_temporaries",
    "sha256_file",
    "write_json",
]

HASH_BLOCK = STAGE = 1 << 20
BLOCK = 4096  # offsets and lengths of direct writes are multiples of it
# What `atomic_write` calls a file until it has its name.
TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}\.tmp")
Piece = bytes | memoryview


class FileSystem:
    """The few operations that decide whether data survives, in one replaceable object.

    Tests subclass it to raise "disk full" or to stop at every boundary.
    """

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Create `path` from the joined pieces; not durable before `fsync_file`. Raises OSError.

        A file that is there already is refused (FileExistsError), so two writers never share one.
        """
        with open(path, "xb") as file:
            for piece in pieces:
                file.write(piece)

    def write_large(self, path: Path, pieces: Iterable[Piece]) -> None:
        """`write`, for a file of many megabytes that nobody reads soon."""
        self.write(path, pieces)

    def fsync_file(self, path: Path) -> None:
        """Make the contents of `path` durable. Raises OSError."""
        _fsync(path, os.O_RDONLY)

    def fsync_directory(self, path: Path) -> None:
        """Make the entries of directory `path` (creations, renames, removals) durable. Raises OSError."""
        _fsync(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))

    def rename(self, source: Path, target: Path) -> None:
        """Atomically give `source` the name `target`, replacing a file already there. Raises OSError."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove the file `path`; one that is gone already is no error. Raises OSError."""
        path.unlink(missing_ok=True)

    def make_directory(self, path: Path) -> None:
        """Create `path`, whose parent must exist. Raises FileExistsError and other OSErrors."""
        path.mkdir()

    def remove_directory(self, path: Path) -> None:
        """Remove the empty directory `path`. Raises OSError."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Remove `path` and all in it, links not followed; one that is gone is no error. Raises OSError."""
        for folder, folders, names in os.walk(path, topdown=False):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for name in sorted(names + links):
                self.unlink(Path(folder, name))
            self.remove_directory(Path(folder))


class Disk(FileSystem):
    """This machine's; large files go past its page cache.

    That saves the processor a copy and the cache's bookkeeping, whose time varied most of all that a save
    does (``python -m benchmarks.checkpoint`` has both ways), and what others have in the cache stays there.
    """

    def write_large(self, path: Path, pieces: Iterable[Piece]) -> None:
        """`write`; buffered where the file system knows no direct writes. Raises OSError."""
        with _Staged(path) as file:
            for piece in pieces:
                file.write(piece)


REAL = Disk()


class _Staged:
    """A new file, written from an aligned stage of memory: whole blocks directly, the rest of the end not."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._stage = mmap.mmap(-1, STAGE)
        self._view, self._held = memoryview(self._stage), 0
        self._flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        self._set_direct(True)

    def __enter__(self) -> _Staged:
        return self

    def write(self, piece: Piece) -> None:
        rest = memoryview(piece).cast("B")
        while rest:
            taken = rest[: STAGE - self._held]
            self._view[self._held : self._held + len(taken)] = taken
            self._held, rest = self._held + len(taken), rest[len(taken) :]
            if self._held == STAGE:
                self._put(0, STAGE)
                self._held = 0

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is None:
                whole = self._held // BLOCK * BLOCK
                self._put(0, whole)
                self._set_direct(False)
                self._put(whole, self._held)
        finally:
            self._view.release()
            self._stage.close()
            self._file.close()

    def _put(self, start: int, stop: int) -> None:
        while start < stop:
            try:
                start += self._file.write(self._view[start:stop])
            except OSError as error:
                # Larger blocks than ours, or what a nearly full disk took ended within one.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)

    def _set_direct(self, on: bool) -> None:
        self._direct = on
        flag = getattr(os, "O_DIRECT", 0)  # Linux
        with contextlib.suppress(OSError):  # not every file system knows it
            fcntl.fcntl(self._file, fcntl.F_SETFL, self._flags | flag if on else self._flags)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, data: bytes | str | Iterable[Piece], *, file_system: FileSystem = REAL) -> None:
    """Replace `path` by `data`: write a temporary file, fsync, rename, fsync the folder.

    Args:
        path: the file, in a folder that exists.
        data: bytes, text (stored as UTF-8), or pieces to be joined, one in memory at a time.
        file_system: what does the work; another one in tests.

    Raises:
        OSError: the folder is missing, the disk is full, ...; `path` then still holds what it held before.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        file_system.write(temporary, [data] if isinstance(data, bytes) else data)
        file_system.fsync_file(temporary)
        file_system.rename(temporary, path)
    except BaseException:
        file_system.unlink(temporary)
        raise
    file_system.fsync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Remove what killed `atomic_write`s left in `directory`; nobody may be writing there. Raises OSError."""
    for path in directory.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            REAL.unlink(path)


def canonical_json(value: object) -> str:
    """`value` as JSON with sorted keys, one item per line and a final newline: equal values give equal bytes.

    Raises:
        ValueError: NaN or an infinity, which JSON cannot hold.
        TypeError: something that is not JSON.
    """
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `value` as canonical JSON, atomically. Raises what `canonical_json` and `atomic_write` raise."""
    atomic_write(path, canonical_json(value))


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged") from error


def sha256_file(path: Path, *, start: int = 0, stop: int = sys.maxsize) -> str:
    """SHA-256 of the file's bytes [start, stop), in hexadecimal. Raises OSError."""
    state = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(max(0, min(HASH_BLOCK, stop - start))):
            state.update(block)
            start += len(block)
    return state.hexdigest()


def digest(value: object) -> str:
    """SHA-256 of `value` as compact JSON with sorted keys: equal values have equal digests everywhere.

    Raises:
        ValueError: NaN or an infinity, which JSON cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_directories(path: Path, *, file_system: FileSystem = REAL) -> None:
    """Make `path` and its parents where they are missing, each durably. Raises OSError."""
    for folder in [folder for folder in (*reversed(path.parents), path) if not folder.exists()]:
        with contextlib.suppress(FileExistsError):  # another process was faster
            file_system.make_directory(folder)
        file_system.fsync_directory(folder.parent)


def commit_directory(attempt: Path, final: Path, *, file_system: FileSystem = REAL) -> None:
    """Give the finished directory `attempt` its name `final`: fsync all of it, rename, fsync the parent.

    A reader therefore sees `final` complete or not at all. `attempt` must lie on the same file system.

    Raises:
        FileExistsError: `final` is there already; it is left as it is, and so is `attempt`.
        OSError: what the file system raises; `final` does not exist then, unless it even refused to take
            the name away again.
    """
    taken = f"{final} exists and is never overwritten: choose another name or remove it"
    if os.path.lexists(final):
        raise FileExistsError(taken)
    for path, is_directory in _inside_out(attempt):
        if is_directory:
            file_system.fsync_directory(path)
        else:
            file_system.fsync_file(path)
    try:
        file_system.rename(attempt, final)
    except OSError as error:  # someone else was faster: a folder is not replaced by one, unless it is empty
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(taken) from error
        raise
    try:
        file_system.fsync_directory(final.parent)
    except OSError:  # what is said to have failed is not there
        with contextlib.suppress(OSError):
            file_system.rename(final, attempt)
        raise


def _inside_out(directory: Path) -> Iterator[tuple[Path, bool]]:
    """Every file below `directory`, then its folder, the deepest first; True marks a folder."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in sorted(names):
            yield Path(folder, name), False
        yield Path(folder), True
