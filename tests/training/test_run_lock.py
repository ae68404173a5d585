"""One job at a time in a run folder; a start waits for one that is about to end."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from tests.training.small_run import make_job, write_dataset
from trellis_dist.training import run_lock
from trellis_dist.training.loop import run
from trellis_dist.training.run_lock import RunLock


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def test_a_second_job_in_a_folder_is_refused(data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "WAIT_S", 0.3)
    with RunLock(tmp_path) as first:
        first.take()
        with pytest.raises(
            ValueError, match=r"another process trains .*: wait for it or end it \(process \d+ on .+\)"
        ):
            run(make_job(data), tmp_path)
    assert "waiting up to" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
    assert run(make_job(data, training={"steps": 1}), tmp_path).step == 1


def test_a_start_waits_for_one_that_ends(data: Path, tmp_path: Path, capsys):
    with RunLock(tmp_path) as first:
        first.take()
        threading.Timer(0.5, first.__exit__, (None, None, None)).start()
        assert run(make_job(data, training={"steps": 1}), tmp_path).step == 1
    assert f"another process still trains {tmp_path}: waiting up to 15 s" in capsys.readouterr().err


def test_a_failed_run_gives_its_lock_back(data: Path, tmp_path: Path):
    job = make_job(data, training={"max_skipped_steps": 0, "z_loss": 1e38})
    for _ in range(2):
        with pytest.raises(ValueError, match="diverged"):
            run(job, tmp_path)


def test_a_file_system_without_locks_is_announced(tmp_path: Path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as lock:
        lock.take()
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
