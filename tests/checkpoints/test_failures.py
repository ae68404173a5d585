"""A disk that fails on one rank: no commit, earlier steps intact, every rank told, none left waiting."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
import torch

from checkpoints.commit import CheckpointWarning
from checkpoints.logical import LogicalTensor
from checkpoints.state import SaveError, latest_verified, save_checkpoint
from tests.checkpoints.helpers import (
    FailingFileSystem,
    assert_holds,
    contents,
    save,
    saved,
)
from trellis_dist.files import REAL, FileSystem

FAILURES = [
    (0, "make-directory", ".attempt"),
    (0, "write", "rank-00000.safetensors"),
    (1, "write", "rank-00001.safetensors"),
    (1, "fsync", "rank-00001.safetensors"),
    (2, "write", "rank-00002.json"),
    (0, "write", "state.json"),
    (0, "write", "manifest.json"),
    (0, "fsync", "manifest.json"),
    (0, "write", "manifest.sha256"),
    (0, "rename", "step-00000002"),
]


@pytest.mark.parametrize("rank, operation, fragment", FAILURES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_one_rank_fails_and_all_raise(
    tmp_path: Path, rank: int, operation: str, fragment: str, code: int
) -> None:
    old = saved(tmp_path, 1, world=3)
    systems: list[FileSystem] = [REAL] * 3
    systems[rank] = FailingFileSystem(operation, fragment, code)
    started = time.monotonic()
    results = save(tmp_path, 2, world=3, file_systems=systems)
    assert time.monotonic() - started < 5
    for index, error in enumerate(results):
        assert isinstance(error, SaveError)
        assert isinstance(error, OSError)
        assert "checkpoint of step 2 not saved" in str(error)
        if index == rank:
            assert f"rank {rank}" in str(error)
            assert isinstance(error.__cause__, OSError)
            assert error.__cause__.errno == code
        else:
            assert "another rank failed" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == [old.name], "the attempt is removed"
    assert latest_verified(tmp_path) == old
    assert_holds(old, contents(1))
    assert_holds(saved(tmp_path, 2, world=3), contents(2))  # and the next save goes through


def test_an_error_of_the_engine_reaches_every_rank(tmp_path: Path) -> None:
    """Any exception on one rank, not only the disk's, must release the others."""
    hole = LogicalTensor("model/w", (4,), (0,), torch.zeros(3))
    results = save(tmp_path, 1, world=2, state={"not json": float("inf")})
    assert all(isinstance(error, SaveError) for error in results)
    assert isinstance(results[0].__cause__, ValueError)  # type: ignore[union-attr]
    with pytest.raises(SaveError, match="3 of 4"):
        save_checkpoint(tmp_path, step=1, tensors=[hole], run_state={})
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_that_cannot_be_removed_is_reported_and_cleared_next_time(tmp_path: Path) -> None:
    class Broken(FailingFileSystem):
        def unlink(self, path: Path) -> None:
            raise OSError(errno.EIO, "cannot remove", str(path))

    with pytest.warns(CheckpointWarning, match="could not be removed"):
        results = save(tmp_path, 1, file_systems=Broken("write", "manifest.json"))
    assert isinstance(results[0], SaveError)
    assert latest_verified(tmp_path) is None
    assert saved(tmp_path, 1).name == "step-00000001"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_old_step_that_cannot_be_removed_does_not_fail_the_save(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.warns(CheckpointWarning, match="an old checkpoint in .* could not be removed"):
        new = saved(tmp_path, 2, keep=1, file_systems=FailingFileSystem("unlink", "manifest.json"))
    assert latest_verified(tmp_path) == new


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file-size limit of the kernel stands in for a full disk: the write itself fails half way."""
    import resource
    import signal

    old = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        results = save(tmp_path, 2, tensors={"model/big": torch.zeros(100_000)}, file_systems=REAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(results[0], SaveError)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert_holds(old, contents(1))
