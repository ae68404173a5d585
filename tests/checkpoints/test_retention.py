"""Old checkpoints go only while a newer one is known to be good; half a removal leaves nothing loadable."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from checkpoints.commit import CheckpointWarning, list_steps, remove_checkpoint
from checkpoints.retention import keep_newest
from checkpoints.state import latest_verified
from tests.checkpoints.helpers import DyingFileSystem, Killed, saved
from trellis_dist.files import REAL


def _steps(root: Path) -> list[int]:
    return list(list_steps(root))


def _damage(path: Path) -> None:
    shard = path / "rank-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("keep, left", [(0, [5, 4, 3, 2, 1]), (1, [5]), (2, [5, 4]), (9, [5, 4, 3, 2, 1])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        saved(tmp_path, step, keep=keep)
    assert _steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_only_rank_zero_removes(tmp_path: Path) -> None:
    for step in range(1, 5):
        saved(tmp_path, step, world=2, keep=2)
    assert _steps(tmp_path) == [4, 3]


def test_the_only_verified_one_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    _damage(tmp_path / "step-00000002")
    _damage(tmp_path / "step-00000003")
    with pytest.warns(CheckpointWarning, match="none of the newest 2 .* nothing older is removed"):
        assert keep_newest(tmp_path, 2) == []
    assert _steps(tmp_path) == [3, 2, 1]
    with pytest.warns(CheckpointWarning):
        assert latest_verified(tmp_path) == tmp_path / "step-00000001"


def test_a_step_without_its_files_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / "step-00000003" / "rank-00000.safetensors").unlink()
    assert keep_newest(tmp_path, 1) == [tmp_path / "step-00000001"]
    assert _steps(tmp_path) == [3, 2], "the damaged newest is left for a person to look at"


def test_the_manifest_goes_first(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    system = DyingFileSystem()
    remove_checkpoint(path, file_system=system)
    assert system.log[:2] == [("unlink", "manifest.json"), ("fsync-directory", "step-00000001")]
    assert list(tmp_path.iterdir()) == []


def test_a_removal_killed_at_every_boundary_leaves_nothing_loadable(tmp_path: Path) -> None:
    counter = DyingFileSystem()
    remove_checkpoint(saved(tmp_path / "count", 1), file_system=counter)
    for stop_at in range(len(counter.log)):
        root = tmp_path / f"at-{stop_at}"
        path = saved(root, 1)
        saved(root, 2)
        with pytest.raises(Killed):
            remove_checkpoint(path, file_system=DyingFileSystem(stop_at))
        (root / "step-00000002").rename(root / "kept")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            assert (latest_verified(root) is None) == (stop_at > 0)
        (root / "kept").rename(root / "step-00000002")
        saved(root, 3, keep=2)  # finishes the removal
        assert sorted(item.name for item in root.iterdir()) == ["step-00000002", "step-00000003"]


def test_keep_newest_of_nothing(tmp_path: Path) -> None:
    assert keep_newest(tmp_path, 1, file_system=REAL) == []
