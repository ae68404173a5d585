"""A damaged checkpoint is never loaded, and the message names the file."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from checkpoints.commit import CheckpointWarning
from checkpoints.state import CheckpointReader, latest_verified, load_run_state, verify_checkpoint
from tests.checkpoints.helpers import contents, saved

FILES = [
    "manifest.json",
    "manifest.sha256",
    "rank-00000.json",
    "rank-00000.safetensors",
    "rank-00001.json",
    "rank-00001.safetensors",
    "state.json",
]
READ_BY_NOBODY = {"rank-00000.json", "rank-00001.json"}  # their contents are in the manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    saved(tmp_path, 1, world=2)
    assert sorted(path.name for path in saved(tmp_path, 2, world=2).iterdir()) == FILES
    return tmp_path


def _assert_named(root: Path, *names: str) -> None:
    """Step 2 is refused by every way of opening it, naming one of `names`; step 1 is loaded instead."""
    newest = root / "step-00000002"
    problems = "; ".join(verify_checkpoint(newest))
    assert str(newest) in problems
    assert all(name in problems for name in names), problems
    with pytest.warns(CheckpointWarning, match=r"step-00000002 is damaged and was passed over") as caught:
        assert latest_verified(root) == root / "step-00000001"
    assert all(name in str(caught[0].message) for name in names)
    if not set(names) <= READ_BY_NOBODY:
        with pytest.raises((ValueError, FileNotFoundError), match="step-00000002"):
            _read_all(newest)


def _read_all(path: Path) -> None:
    load_run_state(path)
    reader = CheckpointReader(path)
    for name in contents(2):
        reader.read(name)


def test_bit_flips_are_detected_and_named(root: Path) -> None:
    chance = random.Random(20)
    for _ in range(84):
        path = root / "step-00000002" / chance.choice(FILES)
        good = path.read_bytes()
        bit = chance.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        _assert_named(root, path.name)
        path.write_bytes(good)
    assert verify_checkpoint(root / "step-00000002") == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", ["truncate", "grow", "empty", "delete", "directory", "link", "dangling link"]
)
def test_files_that_are_not_whole_are_named(root: Path, name: str, damage: str) -> None:
    path = root / "step-00000002" / name
    data = path.read_bytes()
    copy = root / "elsewhere"
    copy.write_bytes(data)
    path.unlink()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    if damage == "grow":
        path.write_bytes(data + b"\0")
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "directory":
        path.mkdir()
    if damage == "link":
        path.symlink_to(copy)
    if damage == "dangling link":
        path.symlink_to(root / "nowhere")
    _assert_named(root, name)


def test_swapped_shards_are_named(root: Path) -> None:
    first, second = (root / "step-00000002" / f"rank-0000{rank}.safetensors" for rank in (0, 1))
    spare = root / "spare"
    for source, target in ((first, spare), (second, first), (spare, second)):
        source.rename(target)
    _assert_named(root, first.name, second.name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_step_is_named(root: Path, name: str) -> None:
    shutil.copy(root / "step-00000001" / name, root / "step-00000002" / name)
    if name in ("manifest.json", "manifest.sha256"):
        _assert_named(root, "manifest.json")
    elif (root / "step-00000001" / name).read_bytes() != (root / "step-00000002" / name).read_bytes():
        _assert_named(root, name)


def test_a_manifest_of_another_step_is_named(root: Path) -> None:
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(root / "step-00000001" / name, root / "step-00000002" / name)
    problems = verify_checkpoint(root / "step-00000002")
    assert "holds step 1" in problems[0]
    assert len(problems) > 3


def test_a_renamed_step_is_refused_and_a_copy_elsewhere_is_not(root: Path) -> None:
    shutil.copytree(root / "step-00000002", root / "best")
    assert verify_checkpoint(root / "best") == []
    (root / "step-00000002").rename(root / "step-00000003")
    assert "holds step 2" in verify_checkpoint(root / "step-00000003")[0]


def test_with_nothing_sound_left_nothing_is_returned(root: Path) -> None:
    for step in (1, 2):
        (root / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.warns(CheckpointWarning) as caught:
        assert latest_verified(root) is None
    assert len(caught) == 2


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError):
            CheckpointReader(path)
        assert len(verify_checkpoint(path)) == 1


def test_a_reader_hashes_only_the_files_it_reads(root: Path) -> None:
    path = root / "step-00000002"
    (path / "rank-00001.safetensors").unlink()
    reader = CheckpointReader(path)
    reader.read("model/embed.weight", offset=(0, 0), shape=(3, 5))
    with pytest.raises(FileNotFoundError, match=r"rank-00001\.safetensors is missing"):
        reader.read("model/embed.weight")
