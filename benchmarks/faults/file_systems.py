"""File systems that stop, lose power or fail at a chosen operation: what kills and full disks look like.

The tests of checkpoints/ use them too.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from trellis_dist.files import FileSystem, Piece

__all__ = ["CheckedFileSystem", "DyingFileSystem", "FailingFileSystem", "Killed", "PowerCutFileSystem"]


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` and no cleanup survives it."""


class DyingFileSystem(FileSystem):
    """Dies just before (or half way into a write) the `stop_at`-th operation and stays dead.

    Nothing is really fsynced. `log` has the operations so far, `died` whether it came to that.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.died = stop_at, False
        self.log: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def _step(self, operation: str, path: Path) -> None:
        with self.lock:
            if self.stop_at is not None and len(self.log) >= self.stop_at:
                self.died = True
                raise Killed
            self.log.append((operation, path.name))

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        data = b"".join(pieces)
        self._step("create", path)
        path.write_bytes(data[: len(data) // 2])
        self._step("write", path)
        path.write_bytes(data)

    def fsync_file(self, path: Path) -> None:
        self._step("fsync", path)

    def fsync_directory(self, path: Path) -> None:
        self._step("fsync-directory", path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self._step("make-directory", path)
        super().make_directory(path)

    def remove_directory(self, path: Path) -> None:
        self._step("remove-directory", path)
        super().remove_directory(path)


class PowerCutFileSystem(DyingFileSystem):
    """Also forgets, at the cut, what no fsync made durable: contents, new names and renames.

    One operation at a time, also of ranks that are threads: what is durable is known exactly.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.dirty: set[Path] = set()
        self.new: set[Path] = set()
        self.renames: list[tuple[Path, Path]] = []

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        with self.lock:
            self.dirty.add(path)
            self.new.add(path)
            super().write(path, pieces)

    def fsync_file(self, path: Path) -> None:
        with self.lock:
            super().fsync_file(path)
            self.dirty.discard(path)

    def fsync_directory(self, path: Path) -> None:
        with self.lock:
            super().fsync_directory(path)
            self.new = {item for item in self.new if item.parent != path}
            self.renames = [pair for pair in self.renames if path not in (pair[0].parent, pair[1].parent)]

    def rename(self, source: Path, target: Path) -> None:
        with self.lock:
            super().rename(source, target)
            self.dirty = self._moved(self.dirty, source, target)
            self.new = self._moved(self.new, source, target)
            self.renames.append((source, target))

    def make_directory(self, path: Path) -> None:
        with self.lock:
            super().make_directory(path)
            self.new.add(path)

    def cut(self) -> None:
        """Forget it, in the files."""
        for path in self.dirty:
            if path.exists():
                path.write_bytes(b"")
        for path in self.new:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
        for source, target in reversed(self.renames):
            if target.exists():
                os.rename(target, source)

    @staticmethod
    def _moved(paths: set[Path], source: Path, target: Path) -> set[Path]:
        return {target / p.relative_to(source) if p.is_relative_to(source) else p for p in paths}


class CheckedFileSystem(FileSystem):
    """Asks `check` before everything it does; what that raises is the operation's failure."""

    def check(self, operation: str, path: Path) -> None:
        """Raise, or let `operation` on `path` happen."""

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        self.check("write", path)
        super().write(path, pieces)

    def fsync_file(self, path: Path) -> None:
        self.check("fsync", path)
        super().fsync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        self.check("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.check("unlink", path)
        super().unlink(path)

    def make_directory(self, path: Path) -> None:
        self.check("make-directory", path)
        super().make_directory(path)

    def fsync_directory(self, path: Path) -> None:
        self.check("fsync-directory", path)
        super().fsync_directory(path)


class FailingFileSystem(CheckedFileSystem):
    """Raises OSError(code) from `operation` on names with `fragment` in them, after half of a write."""

    def __init__(self, operation: str, fragment: str, code: int = errno.ENOSPC) -> None:
        self.operation, self.fragment, self.code = operation, fragment, code

    def check(self, operation: str, path: Path) -> None:
        if operation == self.operation and self.fragment in path.name:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        data = b"".join(pieces)
        if self.operation == "write" and self.fragment in path.name:
            path.write_bytes(data[: len(data) // 2])
        super().write(path, [data])
