"""The main job end to end on a tiny corpus: two ranks, a stop, a resume, scores, a report; then re-used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    "training.steps": 4,
    "training.global_batch_tokens": 256,
    "training.micro_batch": 1,
    "training.validation_interval": 0,
    "training.validation_rows": 2,
    "schedule.warmup_steps": 1,
    "checkpoint.interval": 100,
    "logging.interval": 1,
    "evals.tasks": ["perplexity", "sample"],
    "evals.sample_tokens": 8,
}


def options(folder: Path) -> list[str]:
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    folders = ["--run-dir", str(folder / "run"), "--dataset-dir", str(folder / "shards")]
    return [BASE, "--corpus", str(folder / "texts"), *folders, *overrides]


def trellis(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # A run divides its own cores; a test session's rank variables must not reach it.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("main-job")
    (folder / "texts").mkdir()
    for index, module in enumerate(
        ("argparse", "ast", "calendar", "csv", "enum", "heapq", "json.decoder", "shutil")
    ):
        text = Path(__import__(module, fromlist=["x"]).__file__ or "").read_text(encoding="utf-8")
        (folder / "texts" / f"{index}.txt").write_text(text[:20000], encoding="utf-8")
    return folder, trellis("run", *options(folder), cwd=folder)


def test_the_job_runs_to_a_report(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, ran = finished
    run = folder / "run"
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "validation/bits_per_byte",
        "baseline/bigram_bits_per_byte",
        "ln_vocab",
        "perf/tokens_per_second",
    ):
        assert summary[key] > 0
    for stage in ("prepare", "train_first_half", "train_second_half", "eval", "first_loss"):
        assert summary[f"seconds/{stage}"] > 0
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert "time to the first loss line" in ran.stdout


def test_the_second_half_continued_from_the_first(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ran = finished
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "resuming from" in ran.stdout + ran.stderr
    assert {path.name for path in (folder / "run" / "checkpoints").glob("step-*")} == {
        "step-00000002",
        "step-00000004",
    }


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
    examined = trellis("doctor", "damaged", cwd=folder)
    assert examined.returncode == 1
    assert shard.name in examined.stdout
    changed = [*options(folder), "--dataset-dir", str(folder / "damaged"), "--run-dir", str(folder / "other")]
    refused = trellis("train", *changed, cwd=folder)
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("trellis: error: ")
    assert shard.name in last
    assert "Traceback" not in refused.stderr
