"""A rank: what it says of its failure, and that it ends with its launcher."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch import worker
from launch.failures import log_folder
from launch.recipe import load_recipe, resolve
from tests.training.small_run import exact_rows, state, write_dataset
from trellis_dist.files import read_json, write_json
from trellis_dist.training.collectives import PeerFailedError

BASE = str(Path(__file__).with_name("base.toml"))
LINUX = sys.platform.startswith("linux")
SMALL = {
    "data.sequence_length": 16,
    "data.tokenizer.vocab_size": 400,
    "model.vocab_size": 400,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.trellis.chunk_size": 8,
    "mesh.dp": 1,
    "training.engine": "local",
    "training.steps": 100_000,
    "training.global_batch_tokens": 64,
    "training.micro_batch": 4,
    "training.validation_interval": 0,
    "training.validation_rows": 1,
    "checkpoint.interval": 100_000,
    "logging.interval": 1,
    "logging.tensorboard": False,
}
# The real agent in a process of its own, as `trellis train` is.
LAUNCHER = """
import sys, threading, time
from pathlib import Path
from launch.ranks import run_ranks
for _ in range(8):  # a thread that dies must not count as another request to end
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
run_ranks(1, run_dir=Path(sys.argv[1]), arguments=sys.argv[2:])
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_no_bug(error: BaseException) -> None:
    line = worker.error_line(error)
    assert "lower training.micro_batch" in line
    assert "data.sequence_length" in line
    assert "a bug" not in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    "error, echo", [(PeerFailedError("the data failed on another rank"), True), (ValueError("mine"), False)]
)
def test_the_record_says_whether_another_rank_knows_the_cause(
    error: Exception, echo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(worker, "ECHO_SECONDS", 0.0)
    monkeypatch.setattr(worker, "train_rank", fail)
    write_json(tmp_path / "recipe.json", resolve(load_recipe(BASE)))
    assert worker.main([f"--recipe={tmp_path / 'recipe.json'}", f"--run-dir={tmp_path}"]) == 1
    record = read_json(log_folder(tmp_path) / "failure-rank-00000.json")
    assert (record["echo"], record["message"]) == (echo, str(error))


def launch(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    options = [f"--recipe={run_dir / 'recipe.json'}", f"--run-dir={run_dir}", *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(run_dir), *options],
        env={**environment, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, *, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@pytest.mark.skipif(not LINUX, reason="the ranks of a launcher are looked up in /proc")
def test_ranks_end_with_a_killed_launcher_and_the_next_start_continues(tmp_path: Path) -> None:
    data, run_dir = write_dataset(tmp_path / "set"), tmp_path / "run"
    overrides = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    recipe = load_recipe(BASE, [*overrides, f"data.directory={json.dumps(str(data))}"])
    run_dir.mkdir()
    write_json(run_dir / "recipe.json", resolve(recipe))
    with launch(run_dir) as launcher:
        wait_for(lambda: exact_rows(run_dir) or launcher.poll() is not None)
        assert launcher.poll() is None, launcher.stderr.read()
        rank = int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text())
        os.kill(rank, signal.SIGSTOP)  # until the next start has met its lock
        launcher.kill()
        last = int(exact_rows(run_dir)[-1]["step"]) + 50
        with launch(run_dir, f"--stop-at-step={last}") as second:
            waiting = any("another process still trains" in line for line in second.stderr)
            os.kill(rank, signal.SIGCONT)
            said = second.communicate(timeout=100)[1]
    assert waiting
    assert second.returncode == 0, said
    assert not Path(f"/proc/{rank}").exists()
    assert [row["step"] for row in exact_rows(run_dir)] == list(range(1, last + 1))
    saved_at_the_kill, saved_last = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved_at_the_kill < saved_last == f"step-{last:08d}"


def test_a_rank_that_waits_in_the_rendezvous_for_a_peer_ends_when_asked() -> None:
    """There the main thread is in C++ and runs no handler; the peer may have ended of the same signal."""
    code = (
        "from launch.ending import end_rank_at_once as listen; listen(); from datetime import timedelta; "
        "from torch.distributed import TCPStore; print('up', flush=True); "
        "TCPStore('127.0.0.1', 0, 2, True, timeout=timedelta(seconds=100))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    with rank:
        assert rank.stdout.readline() == "up\n"
        time.sleep(0.2)  # before it waits, an ordinary handler would do
        rank.send_signal(signal.SIGUSR1)
        try:
            assert rank.wait(30) == 75
        finally:
            rank.kill()


@pytest.mark.skipif(not LINUX, reason="the ranks of a launcher are looked up in /proc")
def test_a_rank_whose_launcher_is_gone_already_ends_at_once(tmp_path: Path) -> None:
    """The parent that asks is a shell, as what adopts orphans is: no Python."""
    code = "from launch.worker import end_with_launcher as end; end(); print('still here')"
    done = subprocess.run(
        ["/bin/sh", "-c", f'"{sys.executable}" -c "{code}"; echo status $?'],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split()[-2:] == ["status", str(128 + signal.SIGTERM)], done.stderr
    assert "still here" not in done.stdout


def train(run_dir: Path, data: Path, *options: str) -> subprocess.Popen[str]:
    """`trellis train` on two ranks for 30 steps, as a user starts it."""
    values = {
        **SMALL,
        "mesh.dp": 2,
        "training.steps": 30,
        "checkpoint.interval": 5,
        "training.micro_batch": 2,
    }
    values |= {"data.directory": str(data), "logging.progress": False}
    overrides = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", BASE, "--run-dir", str(run_dir), *overrides, *options],
        env={**environment, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_processes(launcher: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.skipif(not LINUX, reason="the ranks of a launcher are looked up in /proc")
def test_a_killed_rank_is_restarted_and_the_run_is_what_it_would_have_been(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "set")
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    with train(runs["whole"], data) as whole:
        assert whole.wait(timeout=200) == 0
    with train(runs["killed"], data, "--max-restarts", "2") as killed:
        wait_for(lambda: len(exact_rows(runs["killed"])) >= 7 or killed.poll() is not None, seconds=200)
        os.kill(rank_processes(killed.pid)[1], signal.SIGKILL)
        said = killed.communicate(timeout=200)[1]
    assert killed.returncode == 0, said
    reports = [line for line in said.splitlines() if line.startswith("trellis: ")]
    assert len(reports) == 1, said
    assert re.fullmatch(
        rf"trellis: rank 1 on {re.escape(socket.gethostname())}: killed by SIGKILL \(out of memory\?\).*; "
        r"restart 1 of 2 in 1 s; newest checkpoint: step \d+",
        reports[0],
    )
    assert "Traceback" not in said
    assert exact_rows(runs["killed"]) == exact_rows(runs["whole"])
    assert state(runs["killed"], 30) == state(runs["whole"], 30)
