"""trellis_dist.files: a write leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints.helpers import DyingFileSystem, FailingFileSystem, Killed
from trellis_dist import files
from trellis_dist.files import (
    BLOCK,
    REAL,
    STAGE,
    FileSystem,
    atomic_write,
    commit_directory,
    digest,
    make_directories,
    read_json,
    remove_temporaries,
    sha256_file,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_round_trip_and_digest(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert digest(read_json(path)) == digest(value)


def test_json_is_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    write_json(tmp_path / "b.json", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_digest_is_sha256_of_compact_sorted_json() -> None:
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


def test_values_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a":1', b"[" * 100_000])
def test_malformed_json_names_the_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_json(path)


def test_read_json_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 9), (3, 1 << 20), (1, (1 << 20) + 2), (9, 4)])
def test_sha256_of_a_part(tmp_path: Path, start: int, stop: int) -> None:
    data = bytes(range(256)) * 8192
    (tmp_path / "data").write_bytes(data)
    assert (
        sha256_file(tmp_path / "data", start=start, stop=stop) == hashlib.sha256(data[start:stop]).hexdigest()
    )


def test_atomic_write_replaces(tmp_path: Path) -> None:
    atomic_write(tmp_path / "f", "old")
    atomic_write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_atomic_write_joins_pieces_and_keeps_the_old_file_when_they_end_early(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("no more")

    atomic_write(tmp_path / "f", (piece for piece in (b"one", memoryview(b"two"))))
    with pytest.raises(ValueError, match="no more"):
        atomic_write(tmp_path / "f", broken())
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_only_what_killed_writes_left_is_removed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        atomic_write(tmp_path / "f", "new", file_system=DyingFileSystem(3))
    kept = [".f.tmp", ".f.1-abc.tmp", "f.1-0123abcd.tmp", "f"]
    for name in kept:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 5
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_atomic_write_keeps_the_old_file_when_the_disk_fails(tmp_path: Path, operation: str) -> None:
    atomic_write(tmp_path / "f", "old")
    with pytest.raises(OSError):
        atomic_write(tmp_path / "f", "new", file_system=FailingFileSystem(operation, "f"))
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_atomic_write_killed_at_every_boundary(tmp_path: Path) -> None:
    counter = DyingFileSystem()
    atomic_write(tmp_path / "f", json.dumps({"a": 1}), file_system=counter)
    assert [operation for operation, _ in counter.log] == [
        "create",
        "write",
        "fsync",
        "rename",
        "fsync-directory",
    ]
    for stop_at in range(len(counter.log)):
        atomic_write(tmp_path / "f", "old")
        with pytest.raises(Killed):
            atomic_write(tmp_path / "f", "new", file_system=DyingFileSystem(stop_at))
        assert (tmp_path / "f").read_text() == ("new" if stop_at == 4 else "old")


def test_commit_directory_syncs_everything_then_renames(tmp_path: Path) -> None:
    (tmp_path / "attempt" / "inner").mkdir(parents=True)
    (tmp_path / "attempt" / "a").write_text("a")
    (tmp_path / "attempt" / "inner" / "b").write_text("b")
    system = DyingFileSystem()
    commit_directory(tmp_path / "attempt", tmp_path / "final", file_system=system)
    assert system.log == [
        ("fsync", "b"),
        ("fsync-directory", "inner"),
        ("fsync", "a"),
        ("fsync-directory", "attempt"),
        ("rename", "final"),
        ("fsync-directory", tmp_path.name),
    ]
    assert (tmp_path / "final" / "inner" / "b").read_text() == "b"
    assert not (tmp_path / "attempt").exists()


@pytest.mark.parametrize("kind", ["directory", "empty", "file", "dangling link"])
def test_commit_directory_never_overwrites(tmp_path: Path, kind: str) -> None:
    attempt, final = tmp_path / "attempt", tmp_path / "final"
    attempt.mkdir()
    (attempt / "a").write_text("new")
    if kind in ("directory", "empty"):
        final.mkdir()
    if kind == "directory":
        (final / "a").write_text("old")
    if kind == "file":
        final.write_text("old")
    if kind == "dangling link":
        final.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="final"):
        commit_directory(attempt, final)
    assert (attempt / "a").read_text() == "new"
    if kind == "directory":
        assert (final / "a").read_text() == "old"


def test_commit_directory_that_another_was_faster_to_commit(tmp_path: Path) -> None:
    class Raced(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            target.mkdir()
            (target / "a").write_text("theirs")
            super().rename(source, target)

    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt" / "a").write_text("ours")
    with pytest.raises(FileExistsError, match="final exists and is never overwritten"):
        commit_directory(tmp_path / "attempt", tmp_path / "final", file_system=Raced())
    assert (tmp_path / "final" / "a").read_text() == "theirs"
    assert (tmp_path / "attempt" / "a").read_text() == "ours"


def test_a_commit_whose_name_cannot_be_made_durable_is_taken_back(tmp_path: Path) -> None:
    attempt, final = tmp_path / "attempt", tmp_path / "final"
    attempt.mkdir()
    (attempt / "a").write_text("a")
    with pytest.raises(OSError, match="Input/output error"):
        commit_directory(
            attempt, final, file_system=FailingFileSystem("fsync-directory", tmp_path.name, errno.EIO)
        )
    assert (attempt / "a").read_text() == "a"
    assert not final.exists()


def test_folders_are_made_durably_from_the_outermost_on(tmp_path: Path) -> None:
    system = DyingFileSystem()
    make_directories(tmp_path / "a" / "b", file_system=system)
    made = [(operation, name) for operation, name in system.log if operation != "unlink"]
    assert made == [
        ("make-directory", "a"),
        ("fsync-directory", tmp_path.name),
        ("make-directory", "b"),
        ("fsync-directory", "a"),
    ]
    make_directories(tmp_path / "a" / "b", file_system=system)
    assert len(system.log) == len(made)


def test_a_written_file_is_never_shared(tmp_path: Path) -> None:
    FileSystem().write(tmp_path / "f", [b"first"])
    with pytest.raises(FileExistsError):
        FileSystem().write(tmp_path / "f", [b"second"])
    assert (tmp_path / "f").read_bytes() == b"first"


SIZES = st.integers(0, 3 * BLOCK) | st.sampled_from([STAGE - 1, STAGE, STAGE + 1, 2 * STAGE + BLOCK + 5])


@given(st.lists(SIZES, max_size=6), st.integers(0, 9))
def test_a_large_write_holds_the_joined_pieces(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    path, draw = tmp_path_factory.mktemp("large") / "f", random.Random(seed)
    pieces = [draw.randbytes(size) for size in sizes]
    REAL.write_large(path, (memoryview(piece) if draw.random() < 0.5 else piece for piece in pieces))
    assert path.read_bytes() == b"".join(pieces)


def test_a_large_write_goes_past_the_page_cache_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    switch = files._Staged._set_direct
    monkeypatch.setattr(
        files._Staged, "_set_direct", lambda self, on: (asked.append(on), switch(self, on))[1]
    )
    REAL.write_large(tmp_path / "f", [b"x" * (STAGE + BLOCK + 1)])
    assert asked == [True, False]  # off for the one byte behind the last whole block
    assert (tmp_path / "f").stat().st_size == STAGE + BLOCK + 1


def test_a_large_write_is_never_shared_and_leaves_errors_as_they_are(tmp_path: Path) -> None:
    REAL.write_large(tmp_path / "f", [b"first"])
    with pytest.raises(FileExistsError):
        REAL.write_large(tmp_path / "f", [b"second"])
    assert (tmp_path / "f").read_bytes() == b"first"

    def broken() -> Iterator[bytes]:
        yield b"x" * 3 * STAGE
        raise OSError(errno.EIO, "the source broke")

    with pytest.raises(OSError, match="the source broke"):
        REAL.write_large(tmp_path / "g", broken())


class Sparing(io.FileIO):
    """Takes one block of the first write and refuses the second as misaligned."""

    calls = 0

    def write(self, piece: memoryview) -> int:  # type: ignore[override]
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.EINVAL, "not a multiple of my blocks")
        return super().write(piece[:BLOCK] if self.calls == 1 else piece)


def test_a_disk_that_takes_less_than_it_was_given_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        files,
        "open",
        lambda path, mode, buffering: opened.append(Sparing(path, mode)) or opened[0],
        raising=False,
    )
    data = random.Random(0).randbytes(STAGE + 100)
    REAL.write_large(tmp_path / "f", [data])
    assert (tmp_path / "f").read_bytes() == data
    assert opened[0].calls == 4
    assert opened[0].closed


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("p")
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "tree" / "file-link").symlink_to(tmp_path / "outside" / "precious")
    FileSystem().remove_tree(tmp_path / "tree")
    FileSystem().remove_tree(tmp_path / "tree")  # gone already: no error
    assert not (tmp_path / "tree").exists()
    assert (tmp_path / "outside" / "precious").read_text() == "p"
