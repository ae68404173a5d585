"""Is this folder on a file system that keeps checkpoints, and do all nodes see the same one?

The commit protocol stands on atomic rename, fsync and creation that refuses an existing name. Object-store
mounts imitate a file system and lack some of that; better to know before the first step than at a crash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from trellis_dist.files import REAL, FileSystem, atomic_write, make_directories

__all__ = ["announce", "await_token", "probe", "withdraw"]

PROBE = re.compile(r"\.probe-[0-9a-f]{8}|\.token-[0-9a-f]{16}")
POSIX = (
    "use a POSIX file system (ext4, xfs, Lustre, NFSv4 ...), not an object-store mount such as s3fs; "
    "upload with checkpoint.upload"
)
REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EACCES: "give this user the right to write there, or use another --run-dir",
    errno.EPERM: "give this user the right to write there, or use another --run-dir",
    errno.EROFS: "use another --run-dir, it is mounted read-only",
}


def probe(root: Path, *, file_system: FileSystem = REAL) -> None:
    """Try in `root` every operation that checkpoints rest on, and leave nothing; one process calls it.

    `root` is made when it is missing. What a killed probe left is cleared.

    Raises:
        OSError: one failed or did something else; the line names the folder, the operation and the remedy.
    """
    folder = root / f".probe-{os.urandom(4).hex()}"
    trial = _Trial(root, folder, file_system)
    try:
        trial.run()
    finally:
        _clear(root)


def announce(root: Path, token: str) -> Path:
    """Leave `token`, unique to this start, in `root` for the ranks of other nodes to find; rank 0 calls it.

    Returns:
        The file, which `withdraw` takes away once every rank has been through `await_token`.

    Raises:
        OSError: it could not be written.
    """
    path = _token_path(root, token)
    atomic_write(path, token)
    return path


def await_token(root: Path, token: str, timeout: float = 60.0) -> None:
    """Wait until rank 0's `token` is seen in `root`: a network file system may show it late.

    Args:
        root: the folder of the checkpoints, as this node names it.
        token: what rank 0 announced, handed over by other means.
        timeout: seconds.

    Raises:
        OSError: it did not appear; the folder is not shared with rank 0.
    """
    path, deadline = _token_path(root, token), time.monotonic() + timeout
    while not _holds(path, token):
        if time.monotonic() > deadline:
            raise OSError(
                f"{root} on {socket.gethostname()} is not the folder that rank 0 writes to (no token of it "
                f"in {timeout:.0f} s): put the run on a file system that all nodes share"
            )
        time.sleep(0.05)


def withdraw(root: Path, token: str) -> None:
    """Take the token away. Raises OSError."""
    REAL.unlink(_token_path(root, token))


class _Trial:
    """The operations, one after the other, in one scratch folder."""

    def __init__(self, root: Path, folder: Path, file_system: FileSystem) -> None:
        self.root, self.folder, self.files = root, folder, file_system

    def run(self) -> None:
        for what, work in {
            "making the folder": self._make_root,
            "creating a folder": lambda: self.files.make_directory(self.folder),
            "creating a file": lambda: self._write("first", b"old"),
            "fsync of a file": lambda: self.files.fsync_file(self.folder / "first"),
            "refusing to create a file that exists": self._refuse,
            "renaming over a file": self._replace,
            "renaming a folder": self._move,
            "fsync of a folder": self._fsync_folders,
            "removing a file": self._unlink,
            "removing a folder": self._remove,
        }.items():
            self._try(what, work)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, POSIX)
            raise OSError(
                error.errno, f"{self.root}: {what} failed ({error.strerror or error}): {remedy}"
            ) from error

    def _make_root(self) -> None:
        make_directories(self.root)
        _clear(self.root)

    def _write(self, name: str, data: bytes) -> None:
        self.files.write(self.folder / name, [data])

    def _refuse(self) -> None:
        try:
            self._write("first", b"other")
        except FileExistsError:
            pass
        else:
            raise OSError("the file was overwritten")
        self._expect("first", b"old")

    def _replace(self) -> None:
        self._write("second", b"new")
        self.files.fsync_file(self.folder / "second")
        self.files.rename(self.folder / "second", self.folder / "first")
        self._expect("first", b"new")
        self._expect_gone("second")

    def _move(self) -> None:
        self.files.make_directory(self.folder / "attempt")
        self._write("attempt/inside", b"kept")
        self.files.rename(self.folder / "attempt", self.folder / "final")
        self._expect("final/inside", b"kept")
        self._expect_gone("attempt")

    def _fsync_folders(self) -> None:
        for folder in (self.folder / "final", self.folder, self.root):
            self.files.fsync_directory(folder)

    def _unlink(self) -> None:
        self.files.unlink(self.folder / "first")
        self._expect_gone("first")

    def _remove(self) -> None:
        self.files.remove_tree(self.folder)
        self._expect_gone("")

    def _expect(self, name: str, data: bytes) -> None:
        found = (self.folder / name).read_bytes()
        if found != data:
            raise OSError(f"a file holds {found!r} instead of {data!r}")

    def _expect_gone(self, name: str) -> None:
        if os.path.lexists(self.folder / name):
            raise OSError("the old name is still there")


def _clear(root: Path) -> None:
    """Remove what probes and tokens left; what resists is of no harm."""
    for path in root.iterdir() if root.is_dir() else ():
        if PROBE.fullmatch(path.name):
            try:
                REAL.remove_tree(path) if path.is_dir() else REAL.unlink(path)
            except OSError:
                continue


def _token_path(root: Path, token: str) -> Path:
    return root / f".token-{hashlib.sha256(token.encode()).hexdigest()[:16]}"


def _holds(path: Path, token: str) -> bool:
    try:
        os.listdir(path.parent)  # lets a network file system look again
        return path.read_bytes() == token.encode()
    except FileNotFoundError:
        return False
