"""The probe refuses what only looks like a file system, says which operation failed, and leaves nothing."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from checkpoints.probe import announce, await_token, probe, withdraw
from tests.checkpoints.helpers import FailingFileSystem
from trellis_dist.files import FileSystem, Piece


class Failing(FileSystem):
    """Raises OSError(code) from the method `operation` on names with `fragment` in them."""

    def __init__(self, operation: str, fragment: str = "", code: int = errno.EINVAL) -> None:
        self.operation, self.fragment, self.code = operation, fragment, code

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if name.startswith("_") or not callable(value) or name != self.operation:
            return value

        def checked(path: Path, *rest: object) -> object:
            if self.fragment in path.name:
                raise OSError(self.code, "it is imitated", str(path))
            return value(path, *rest)

        return checked


class CopyingRename(FileSystem):
    """An object-store mount: rename copies, and the old name stays."""

    def rename(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


class RenameKeepsOld(FileSystem):
    """Rename does not replace a file."""

    def rename(self, source: Path, target: Path) -> None:
        if target.exists():
            source.unlink()
        else:
            super().rename(source, target)


class RenameLosesContents(FileSystem):
    """Rename of a folder is not that of what is in it."""

    def rename(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.rmtree(source)
            target.mkdir()
        else:
            super().rename(source, target)


class Overwriting(FileSystem):
    """Exclusive creation is not."""

    def write(self, path: Path, pieces: Iterable[Piece]) -> None:
        path.write_bytes(b"".join(pieces))


class KeepsFiles(FileSystem):
    """Says it removed a file."""

    def unlink(self, path: Path) -> None:
        pass


def test_a_real_file_system_passes_and_nothing_is_left(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    (root / ".probe-0123abcd").mkdir(parents=True)
    (root / ".token-0123456789abcdef").write_text("of a killed start")
    (root / "step-00000001").mkdir()
    (root / ".probe-notes").write_text("")
    probe(root)
    assert sorted(path.name for path in root.iterdir()) == [".probe-notes", "step-00000001"]


@pytest.mark.parametrize(
    "system, operation",
    [
        (Failing("make_directory"), "creating a folder"),
        (Failing("write", "first"), "creating a file"),
        (Failing("fsync_file"), "fsync of a file"),
        (Failing("write", "second"), "renaming over a file"),
        (Failing("rename", "second"), "renaming over a file"),
        (Failing("rename", "attempt"), "renaming a folder"),
        (Failing("fsync_directory"), "fsync of a folder"),
        (Failing("fsync_directory", "checkpoints"), "fsync of a folder"),
        (Failing("unlink"), "removing a file"),
        (Failing("remove_directory"), "removing a folder"),
        (CopyingRename(), "renaming over a file"),
        (RenameKeepsOld(), "renaming over a file"),
        (RenameLosesContents(), "renaming a folder"),
        (Overwriting(), "refusing to create a file that exists"),
        (KeepsFiles(), "removing a file"),
    ],
)
def test_each_operation_that_fails_is_named(tmp_path: Path, system: FileSystem, operation: str) -> None:
    root = tmp_path / "checkpoints"
    with pytest.raises(OSError) as caught:
        probe(root, file_system=system)
    text = str(caught.value)
    assert f"{root}: {operation} failed (" in text
    assert "POSIX file system (ext4, xfs, Lustre, NFSv4 ...)" in text
    assert "checkpoint.upload" in text
    assert "\n" not in text
    assert list(root.iterdir()) == []


def test_a_copying_rename_of_a_folder_is_found_too(tmp_path: Path) -> None:
    class OnlyFolders(CopyingRename):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target) if source.is_dir() else FileSystem.rename(self, source, target)

    with pytest.raises(OSError, match=r"renaming a folder failed \(the old name is still there\)"):
        probe(tmp_path, file_system=OnlyFolders())


@pytest.mark.parametrize(
    "code, remedy",
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "right to write"), (errno.EROFS, "mounted read-only")],
)
def test_what_is_no_question_of_the_kind_has_its_own_remedy(tmp_path: Path, code: int, remedy: str) -> None:
    with pytest.raises(OSError, match=remedy) as caught:
        probe(tmp_path, file_system=FailingFileSystem("fsync", "first", code))
    assert caught.value.errno == code
    assert "s3fs" not in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/checkpoints: making the folder failed"):
        probe(tmp_path / "file" / "checkpoints")


def test_a_shared_folder_shows_the_token_a_little_later(tmp_path: Path) -> None:
    def late() -> None:
        time.sleep(0.2)
        announce(tmp_path, "start-7")

    thread = threading.Thread(target=late)
    thread.start()
    await_token(tmp_path, "start-7", timeout=30)
    thread.join()
    withdraw(tmp_path, "start-7")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared_is_said(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    path = announce(theirs, "start-7")
    announce(mine, "start-6")
    with pytest.raises(
        OSError, match=r"mine on .* is not the folder that rank 0 writes to .*all nodes share"
    ):
        await_token(mine, "start-7", timeout=0.1)
    path.write_text("start-8")
    with pytest.raises(OSError, match="not the folder"):
        await_token(theirs, "start-7", timeout=0.1)
    with pytest.raises(OSError, match="not the folder"):
        await_token(tmp_path / "nowhere", "start-7", timeout=0.1)
