"""Saves in the background: what ranks learn of each other, and that nothing else is ever committed."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoints.background import BackgroundSaver, Settled, Status
from checkpoints.commit import attempt_name
from checkpoints.logical import LogicalTensor
from checkpoints.state import CheckpointReader, latest_verified, verify_checkpoint
from tests.checkpoints.helpers import (
    DyingFileSystem,
    FailingFileSystem,
    assert_holds,
    contents,
    fragment,
    saved,
)
from trellis_dist.files import FileSystem

SLOW_S = 30.0


def savers(
    root: Path, world: int, file_systems: Sequence[FileSystem] | None = None, **options: Any
) -> list[BackgroundSaver]:
    """One saver per rank of a simulated run, rank 0's name known to all."""
    file_systems = file_systems or [DyingFileSystem()] * world
    return [
        BackgroundSaver(
            root,
            rank=rank,
            world_size=world,
            name=lambda step: attempt_name(step, number=7),
            file_system=file_systems[rank],
            **options,
        )
        for rank in range(world)
    ]


def start(ranks: Sequence[BackgroundSaver], step: int) -> list[list[LogicalTensor]]:
    """Begin to save `contents(step)`; returns the live tensors, which the test may overwrite."""
    whole, live = contents(step), []
    for rank, saver in enumerate(ranks):
        slices = [fragment(name, t.clone(), rank=rank, world=len(ranks)) for name, t in whole.items()]
        saver.start(step, slices, {"step": step})
        live.append(slices)
    return live


def settle(ranks: Sequence[BackgroundSaver], seconds: float = SLOW_S) -> list[Settled]:
    """Compare statuses, as a step does, until the save is settled; on all ranks at the same comparison."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses = [int(saver.status) for saver in ranks]
        results = [saver.settle(statuses) for saver in ranks]
        if any(result is not None for result in results):
            assert all(result is not None for result in results), "ranks disagree"
            return [result for result in results if result is not None]
        time.sleep(0.005)
    raise AssertionError("the save was never settled")


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_saved_is_the_state_at_the_start_whatever_training_does_next(
    tmp_path: Path, world: int
) -> None:
    ranks = savers(tmp_path, world)
    for step in (1, 2):  # the second one uses the buffers of the first
        for saver, slices in zip(ranks, start(ranks, step), strict=True):
            saver.wait_copied()
            for item in slices:
                item.local.zero_()
        assert [result.failed for result in settle(ranks)] == [()] * world
        assert_holds(tmp_path / f"step-0000000{step}", contents(step))
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
    assert [saver.status for saver in ranks] == [Status.IDLE] * world


def test_a_result_names_the_step_and_counts_the_bytes(tmp_path: Path) -> None:
    ranks = savers(tmp_path, 2)
    start(ranks, 3)
    assert [saver.in_flight for saver in ranks] == [3, 3]
    results = settle(ranks)
    assert [result.step for result in results] == [3, 3]
    reader = CheckpointReader(tmp_path / "step-00000003")
    files = [reader.manifest.files[f"rank-0000{rank}.safetensors"].size for rank in range(2)]
    assert [result.size for result in results] == files
    assert all(result.seconds > 0 for result in results)


class Blocked(FileSystem):
    """Holds its writes until it is let go: a slow disk."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def write(self, path: Path, pieces: Any) -> None:
        assert self.go.wait(SLOW_S)
        super().write(path, pieces)


def test_nothing_is_committed_before_the_slowest_rank_is_durable(tmp_path: Path) -> None:
    slow = Blocked()
    ranks = savers(tmp_path, 3, [FileSystem(), FileSystem(), slow])
    start(ranks, 1)
    for saver in ranks[:2]:
        saver.wait(0.3)
    statuses = [int(saver.status) for saver in ranks]
    assert statuses == [Status.WORKING, Status.DONE, Status.WORKING]
    assert [saver.settle(statuses) for saver in ranks] == [None] * 3
    assert latest_verified(tmp_path) is None
    slow.go.set()
    settle(ranks)
    assert verify_checkpoint(tmp_path / "step-00000001") == []


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(
    "operation, fragment_of_name, code",
    [
        ("write", "safetensors", errno.ENOSPC),
        ("fsync", "safetensors", errno.EIO),
        ("rename", "rank-", errno.EIO),
    ],
)
def test_one_rank_fails_every_rank_learns_and_nothing_is_committed(
    tmp_path: Path, failing: int, operation: str, fragment_of_name: str, code: int
) -> None:
    saved(tmp_path, 1)
    systems: list[FileSystem] = [DyingFileSystem() for _ in range(3)]
    systems[failing] = FailingFileSystem(operation, fragment_of_name, code)
    ranks = savers(tmp_path, 3, systems)
    start(ranks, 2)
    results = settle(ranks)
    assert [result.failed for result in results] == [(failing,)] * 3
    for rank, result in enumerate(results):
        if rank == failing:
            assert isinstance(result.error.__cause__, OSError)
            assert result.error.__cause__.errno == code
            assert f"rank {failing}" in str(result.error)
        else:
            assert result.error is None
    assert_holds(tmp_path / "step-00000001", contents(1))
    for saver in ranks:  # the next save works
        saver._file_system = FileSystem()
    start(ranks, 3)
    assert [result.failed for result in settle(ranks)] == [()] * 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000003"}, "the attempt is removed"


@pytest.mark.parametrize("operation", ["make-directory", "rename"])
def test_rank_zero_fails_at_the_ends_of_a_save(tmp_path: Path, operation: str) -> None:
    name = ".attempt" if operation == "make-directory" else "step-"
    ranks = savers(tmp_path, 2, [FailingFileSystem(operation, name), FileSystem()])
    tmp_path.joinpath("x").mkdir()
    start(ranks, 1)
    assert [result.failed for result in settle(ranks)] == [(0,), (0,)]
    for saver in ranks:
        saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_writer_that_raises_anything_is_an_error_and_no_commit(tmp_path: Path) -> None:
    class Broken(FileSystem):
        def write(self, path: Path, pieces: Any) -> None:
            raise RuntimeError("a bug in the writer")

    ranks = savers(tmp_path, 2, [FileSystem(), Broken()])
    start(ranks, 1)
    results = settle(ranks)
    assert results[0].error is None
    assert "a bug in the writer" in str(results[1].error)
    assert latest_verified(tmp_path) is None


def _killed_at(root: Path, stop_at: int, world: int) -> int:
    """Save step 2 with every rank dying at its operation `stop_at`; returns the operations of rank 0."""
    systems = [DyingFileSystem(stop_at if rank == 0 else None) for rank in range(world)]
    ranks = savers(root, world, systems)
    start(ranks, 2)
    ranks[0].wait(SLOW_S)
    for saver in ranks:
        saver.close()
    return len(systems[0].log)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("world", [1, 2])
def test_rank_zero_killed_at_every_boundary_leaves_a_whole_step(tmp_path: Path, world: int) -> None:
    count = _killed_at(tmp_path / "count", 10**9, world)
    assert count > 10
    newer = 0
    for stop_at in range(count):
        root = tmp_path / str(stop_at)
        saved(root, 1)
        _killed_at(root, stop_at, world)
        found = latest_verified(root)
        assert found is not None
        step = int(found.name[-1])
        assert_holds(found, contents(step))
        newer += step == 2
    assert 0 < newer < count, "some kills come before the commit, some after it"


def test_what_comes_afterwards_does_not_hold_up_training_and_is_waited_for(tmp_path: Path) -> None:
    go, done = threading.Event(), []

    def afterwards(path: Path) -> None:
        assert go.wait(SLOW_S)
        done.append(path.name)

    (saver,) = savers(tmp_path, 1, afterwards=afterwards)
    start([saver], 1)
    settle([saver])
    start([saver], 2)
    saver.wait_copied()  # training goes on
    saver.wait(0.1)
    assert saver.status == Status.WORKING, "a save waits for what the one before it still removes"
    go.set()
    settle([saver])
    saver.close()
    assert done == ["step-00000001", "step-00000002"]


def test_closing_in_flight_removes_the_attempt(tmp_path: Path) -> None:
    ranks = savers(tmp_path, 2, [FileSystem(), Blocked()])
    start(ranks, 1)
    ranks[0].wait(0.1)
    ranks[0].close()
    assert list(tmp_path.iterdir()) == []
    ranks[1]._file_system.go.set()  # type: ignore[attr-defined]
    ranks[1].close()


def test_a_second_save_in_flight_is_a_bug(tmp_path: Path) -> None:
    (saver,) = savers(tmp_path, 1, [Blocked()])
    start([saver], 1)
    with pytest.raises(AssertionError, match="step 1 is still in flight"):
        start([saver], 2)
    saver._file_system.go.set()  # type: ignore[attr-defined]
    settle([saver])


class NoDirectory(FileSystem):
    """A disk whose directories cannot be made durable."""

    def fsync_directory(self, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_a_rank_whose_directory_is_not_durable_has_not_said_that_it_is_done(tmp_path: Path) -> None:
    ranks = savers(tmp_path, 2, [FileSystem(), NoDirectory()])
    start(ranks, 1)
    ranks[1].wait(SLOW_S)
    assert ranks[1].status == Status.FAILED
    (attempt,) = tmp_path.iterdir()
    assert not (attempt / "rank-00001.json").exists()
    assert [result.failed for result in settle(ranks)] == [(1,), (1,)]
    assert latest_verified(tmp_path) is None


def test_nothing_can_fail_after_the_description_is_there(tmp_path: Path) -> None:
    """Rank 0 may commit from that moment on, and the attempt has another name then."""
    log = DyingFileSystem()
    ranks = savers(tmp_path, 2, [FileSystem(), log])
    start(ranks, 1)
    settle(ranks)
    for saver in ranks:
        saver.close()
    assert log.log[-1] == ("rename", "rank-00001.json")


def test_the_next_snapshot_waits_for_one_that_is_still_copied(tmp_path: Path) -> None:
    """The save failed on rank 1 while rank 0 was still copying: its buffers are the next save's."""
    go, copies = threading.Event(), []
    ranks = savers(tmp_path, 2, [FileSystem(), FileSystem()])
    like = ranks[0]._buffers.like

    def no_memory(item: LogicalTensor) -> Any:
        raise MemoryError("no host memory for the copy")

    def slow(item: LogicalTensor) -> Any:
        copies.append(item.name)
        assert go.wait(SLOW_S)
        return like(item)

    ranks[0]._buffers.like, ranks[1]._buffers.like = slow, no_memory  # type: ignore[method-assign]
    live = start(ranks, 1)
    ranks[1].wait(SLOW_S)
    settled = settle(ranks)
    assert settled[0].failed == (1,)
    assert "no host memory" in str(settled[1].error)
    threading.Timer(0.2, go.set).start()
    ranks[1]._buffers.like = like  # type: ignore[method-assign]
    start(ranks, 2)
    assert go.is_set(), "the second snapshot began while the first one was copying"
    for saver in ranks:
        saver.wait_copied()
    for slices in live:
        for item in slices:
            item.local.zero_()
    settle(ranks)
    assert_holds(tmp_path / "step-00000002", contents(2))
    assert len(copies) < 2 * len(contents(1)), "a save that failed is not copied to its end"
