"""Disks of rows 9 to 11: full ones, slow ones, one that fails for one step only, a writer with a bug."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from benchmarks.faults.file_systems import CheckedFileSystem
from trellis_dist.files import REAL, FileSystem, Piece

__all__ = ["DevFull", "OfOneStep", "Raising", "Slow", "Watched"]

LIMIT_S = 60.0


class OfOneStep(FileSystem):
    """Another file system for the attempt at one step, the real one for all else."""

    def __init__(self, step: int, other: FileSystem) -> None:
        """Files of the attempt at `step` go to `other`."""
        self._mark, self._other = f".attempt-step-{step:08d}-", other

    def _of(self, path: Path) -> FileSystem:
        return self._other if self._mark in str(path) else REAL

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Pass on."""
        self._of(path).write(path, pieces)

    def fsync_file(self, path: Path) -> None:
        """Pass on."""
        self._of(path).fsync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        """Pass on."""
        self._of(source).rename(source, target)


class Watched(FileSystem):
    """The real one, and whether it has failed."""

    def __init__(self) -> None:
        """It has not."""
        self.failed = threading.Event()

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Write."""
        try:
            super().write(path, pieces)
        except OSError:
            self.failed.set()
            raise


class DevFull(FileSystem):
    """Tensors go to /dev/full: the kernel itself says that there is no space."""

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Create the file, as a full disk still would, and fail."""
        if path.suffix != ".safetensors":
            super().write(path, pieces)
            return
        path.touch()
        with open("/dev/full", "wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)


class Raising(CheckedFileSystem):
    """A bug in the writer: an error that is no OSError, at an operation on names with a fragment."""

    def __init__(self, operation: str, fragment: str) -> None:
        """Raise at `operation` on names that hold `fragment`."""
        self._operation, self._fragment = operation, fragment

    def check(self, operation: str, path: Path) -> None:
        """Raise or not."""
        if operation == self._operation and self._fragment in path.name:
            raise RuntimeError(f"a bug in the writer ({operation} {self._fragment})")


class Slow(FileSystem):
    """Holds its writes until it is let go."""

    def __init__(self) -> None:
        """Held at first."""
        self.go = threading.Event()

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        """Wait, then write."""
        assert self.go.wait(LIMIT_S), "nobody let the slow disk go"
        super().write(path, pieces)
