"""The main job end to end on a tiny corpus: two ranks, killed and started again, a stop, a resume, scores, a
report; then re-used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.cli import main

BASE = str(Path(__file__).with_name("base.toml"))

SMALL = {
    "data.tokenizer.vocab_size": 400,
    "data.tokenizer.sample_bytes": 100000,
    "model.vocab_size": 400,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.trellis.chunk_size": 16,
    "data.sequence_length": 64,
    "data.validation_fraction": 0.2,
    "training.steps": 40,
    "training.global_batch_tokens": 256,
    "training.micro_batch": 1,
    "training.validation_interval": 0,
    "training.validation_rows": 2,
    "schedule.warmup_steps": 1,
    "checkpoint.interval": 2,
    "logging.interval": 1,
    "evals.tasks": ["perplexity", "sample"],
    "evals.sample_tokens": 8,
}


def options(folder: Path) -> list[str]:
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    folders = ["--run-dir", str(folder / "run"), "--dataset-dir", str(folder / "shards")]
    return [BASE, "--corpus", str(folder / "texts"), *folders, *overrides]


def environment() -> dict[str, str]:
    # A run divides its own cores; a test session's rank variables must not reach it.
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def trellis(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=280)


def kill_in_training(folder: Path) -> None:
    """Start the job and kill all its processes, ranks included, once it has a loss and a checkpoint."""
    stages, checkpoints = folder / "run" / "stages.json", folder / "run" / "checkpoints"
    with (folder / "killed.log").open("wb") as log:
        command = [sys.executable, "-m", "launch.cli", "run", *options(folder)]
        job = psutil.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
        while not any(checkpoints.glob("step-*")) or "first_loss" not in stages.read_text():
            assert job.poll() is None, (folder / "killed.log").read_text()
            time.sleep(0.01)
        processes = [job, *job.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("main-job")
    (folder / "texts").mkdir()
    for index, module in enumerate(
        ("argparse", "ast", "calendar", "csv", "enum", "heapq", "json.decoder", "shutil")
    ):
        text = Path(__import__(module, fromlist=["x"]).__file__ or "").read_text(encoding="utf-8")
        (folder / "texts" / f"{index}.txt").write_text(text[:20000], encoding="utf-8")
    kill_in_training(folder)
    return folder, trellis("run", *options(folder), cwd=folder)


def test_the_job_runs_to_a_report(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ran = finished
    run = folder / "run"
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "validation/bits_per_byte",
        "baseline/bigram_bits_per_byte",
        "baseline/unigram_bits_per_byte",
        "ln_vocab",
        "perf/tokens_per_second",
    ):
        assert summary[key] > 0
    for stage in ("prepare", "train_first_half", "train_second_half", "eval", "first_loss"):
        assert summary[f"seconds/{stage}"] > 0
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert "time to the first loss line" in ran.stdout


def test_it_continued_where_it_was_killed_and_where_it_stopped(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ran = finished
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    killed, stopped = map(int, re.findall(r"resuming from \S+/step-(\d+)", ran.stdout + ran.stderr))
    assert 2 <= killed < stopped == 20
    assert "trellis: prepare: done before, re-used" in ran.stdout
    kept = {path.name for path in (folder / "run" / "checkpoints").glob("step-*")}
    assert kept == {"step-00000038", "step-00000040"}


def test_tensorboard_has_the_metrics_and_the_scores(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {event.step: event.value for event in events.Scalars("loss/train")}
    assert losses == pytest.approx({row["step"]: row["loss/train"] for row in rows})
    scored = [tag for tag in events.Tags()["scalars"] if [e.step for e in events.Scalars(tag)] == [40]]
    assert any("bits_per_byte" in tag for tag in scored), events.Tags()["scalars"]


def test_a_second_run_reuses_everything(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    before = (folder / "run" / "stages.json").read_text()
    again = trellis("run", *options(folder), cwd=folder)
    assert again.returncode == 0, again.stderr
    for stage in ("prepare", "train", "eval"):
        assert f"trellis: {stage}: done before, re-used" in again.stdout
    assert (folder / "run" / "stages.json").read_text() == before


def test_a_finished_run_is_used_by_the_other_commands(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    assert main(["doctor", "run"]) == 0
    assert main(["generate", "run", "--prompt", "def ", "--tokens", "4", "--temperature", "0"]) == 0
    assert main(["export", "run", "exported"]) == 0
    assert (folder / "exported" / "model.safetensors").is_file()
    assert "run run: whole" in capsys.readouterr().out
    (folder / "shards").rename(folder / "moved")
    assert main(["doctor", "run"]) == 1
    assert f"damaged: no prepared data set in {folder / 'shards'}" in capsys.readouterr().out
    assert main(["generate", "run", "--prompt", "def ", "--tokens", "1"]) == 1
    capsys.readouterr()
    moved = ["--dataset-dir", "moved"]
    assert main(["generate", "run", "--prompt", "def ", "--tokens", "1", *moved]) == 0
    assert main(["eval", "run", *moved]) == 0
    assert main(["export", "run", "exported-again", *moved]) == 0
    assert main(["doctor", "exported-again"]) == 0
    assert main(["generate", "exported-again", "--prompt", "def ", "--tokens", "1"]) == 0
    weights = folder / "exported-again" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\1")
    capsys.readouterr()
    assert main(["doctor", "exported-again"]) == 1
    assert "model.safetensors" in capsys.readouterr().out
    (folder / "moved").rename(folder / "shards")
    assert main(["train", *options(folder), "--set=optimizer.lr=1"]) == 1
    assert "holds a run with another recipe (optimizer.lr 0.004 -> 1" in capsys.readouterr().err


def test_a_corrupt_shard_is_named_by_doctor_and_by_train(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    shutil.copytree(folder / "shards", folder / "damaged")
    shard = next((folder / "damaged").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    examined = trellis("doctor", "damaged", "--check", cwd=folder)
    assert examined.returncode == 1
    assert shard.name in examined.stdout
    changed = [*options(folder), "--dataset-dir", str(folder / "damaged"), "--run-dir", str(folder / "other")]
    refused = trellis("train", *changed, cwd=folder)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("trellis: error: ")
    assert shard.name in last
    assert "Traceback" not in refused.stderr
