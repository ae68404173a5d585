"""Stopped at every file-system boundary, a save leaves the old step or the new one, complete."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from checkpoints.commit import PROCESS, CheckpointWarning, _host, find_attempt
from checkpoints.state import SaveError, latest_verified, load_run_state
from tests.checkpoints.helpers import (
    DyingFileSystem,
    Killed,
    PowerCutFileSystem,
    assert_holds,
    contents,
    save,
    saved,
)


def _boundaries(folder: Path, *, world: int, keep: int) -> int:
    """How many operations one save needs (with a removal, when `keep` asks for one)."""
    saved(folder, 1, world=world)
    counter = DyingFileSystem()
    saved(folder, 2, world=world, keep=keep, file_systems=counter)
    return len(counter.log)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_every_boundary(tmp_path: Path, world: int) -> None:
    count = _boundaries(tmp_path / "count", world=world, keep=1)
    assert count > 25
    for stop_at in range(count):
        root = tmp_path / f"at-{stop_at}"
        saved(root, 1, world=world)
        results = save(root, 2, world=world, keep=1, file_systems=DyingFileSystem(stop_at))
        assert any(isinstance(result, Killed) for result in results)
        _assert_one_complete_step(root)
        # The next run goes on as if nothing had been, and clears away what is left.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            saved(root, 2, world=world, keep=1)
        assert [item.name for item in root.iterdir()] == ["step-00000002"]
        assert_holds(root / "step-00000002", contents(2))


def test_power_cut_at_every_boundary(tmp_path: Path) -> None:
    count = _boundaries(tmp_path / "count", world=1, keep=0)
    for stop_at in range(count + 1):
        root = tmp_path / f"at-{stop_at}"
        saved(root, 1)
        system = PowerCutFileSystem(stop_at)
        results = save(root, 2, file_systems=system)
        system.cut()
        step = _assert_one_complete_step(root)
        if stop_at == count:
            assert results == [root / "step-00000002"]
            assert step == 2, "a save that returned must survive a power cut"


def test_power_cut_during_the_first_save(tmp_path: Path) -> None:
    for stop_at in range(0, 40, 3):
        root = tmp_path / f"at-{stop_at}" / "run" / "checkpoints"
        system = PowerCutFileSystem(stop_at)
        results = save(root, 1, file_systems=system)
        system.cut()
        found = latest_verified(root)
        assert found is not None or not isinstance(results[0], Path)
        if found:
            assert_holds(found, contents(1))
    assert not system.died, "the last of them is a whole save"


def test_killed_while_saving_an_existing_step(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    for stop_at in range(30):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            save(tmp_path, 1, tensors=contents(9), file_systems=DyingFileSystem(stop_at))
        assert latest_verified(tmp_path) == path
        assert_holds(path, contents(1))


def _assert_one_complete_step(root: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        found = latest_verified(root)
    assert found is not None
    step = int(found.name.removeprefix("step-"))
    assert step in (1, 2)
    assert load_run_state(found)["step"] == step
    assert_holds(found, contents(step))
    return step


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _attempt(root: Path, *, step: int, host: str, process: int, token: str = "0" * 8) -> Path:
    path = root / f".attempt-step-{step:08d}-{host}-{process}-{token}-0123abcd"
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").write_bytes(b"half")
    return path


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    old = 0.0, 0.0
    dead = _attempt(tmp_path, step=1, host=_host(), process=_dead_process())
    recycled = _attempt(tmp_path, step=1, host=_host(), process=os.getpid())
    same_step = _attempt(tmp_path, step=5, host="elsewhere", process=1)
    forgotten = _attempt(tmp_path, step=1, host="elsewhere", process=1)
    os.utime(forgotten, old)
    removal = tmp_path / ".removed-step-00000001-0123abcd"
    removal.mkdir()
    alive = _attempt(tmp_path, step=2, host=_host(), process=os.getppid())
    mine = _attempt(tmp_path, step=3, host=_host(), process=os.getpid(), token=PROCESS)
    remote = _attempt(tmp_path, step=4, host="else-where", process=1)
    unrelated = tmp_path / ".attempt-notes"
    unrelated.mkdir()
    saved(tmp_path, 5)
    assert not any(path.exists() for path in (dead, recycled, same_step, forgotten, removal))
    assert all(path.exists() for path in (alive, mine, remote, unrelated))


def test_a_rank_that_does_not_see_the_attempt_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"0 attempts at step-00000003.*share this folder"):
        find_attempt(tmp_path, 3, timeout=0.1)
    for host in ("a", "b"):
        _attempt(tmp_path, step=3, host=host, process=1)
    with pytest.raises(OSError, match="2 attempts"):
        find_attempt(tmp_path, 3, timeout=0.1)


def test_a_superseded_save_fails_and_commits_nothing(tmp_path: Path) -> None:
    """Two jobs in one folder: the second clears the first's attempt; the first must not half-commit."""

    class Supersede(DyingFileSystem):
        def fsync_file(self, path: Path) -> None:
            if path.name == "state.json" and path.exists():
                saved(tmp_path, 2, tensors=contents(8))
            super().fsync_file(path)

    with pytest.raises(SaveError):
        saved(tmp_path, 2, file_systems=Supersede())
    assert_holds(tmp_path / "step-00000002", contents(8))
