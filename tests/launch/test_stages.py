"""The stages of the main job, one at a time: what is repaired, what is timed, what is refused first."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints.logical import LogicalTensor
from checkpoints.state import save_checkpoint
from launch import main_job
from launch.recipe import Recipe, load_recipe
from launch.run_folder import StageSeconds

BASE = str(Path(__file__).with_name("base.toml"))


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(BASE, overrides, dataset_dir=folder / "shards")


def save(run: Path, step: int) -> Path:
    weight = torch.zeros(2)
    tensors = [LogicalTensor("model/w", (2,), (0,), weight)]
    return save_checkpoint(
        run / "checkpoints", step=step, tensors=tensors, run_state={"data": {"fingerprint": "f"}}
    )


def test_a_manifest_that_cannot_be_read_is_left_to_prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "manifest.json").write_text("{")
    made = SimpleNamespace(fingerprint="f", seconds={})
    monkeypatch.setattr("data_pipeline.job.prepare", lambda *_, **__: made)
    seconds = StageSeconds(tmp_path)
    assert main_job._prepare(recipe_in(tmp_path), seconds, print) == "f"
    assert seconds.all()["prepare"] >= 0


def test_a_damaged_last_checkpoint_is_no_finished_run(tmp_path: Path) -> None:
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    assert main_job._trained_on(tmp_path, 2) == "f"
    next(last.glob("rank-*.safetensors")).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert main_job._trained_on(tmp_path, 2) is None
    (last / "state.json").unlink()
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert main_job._newest(tmp_path) == (tmp_path / "checkpoints" / "step-00000001", 1)


def test_an_interrupted_stage_is_timed_and_the_next_start_adds_to_it(tmp_path: Path) -> None:
    seconds = StageSeconds(tmp_path)
    seconds.add("eval", 100.0)
    with pytest.raises(KeyboardInterrupt), main_job._timed("eval", seconds, print):
        raise KeyboardInterrupt
    before = seconds.all()["eval"]
    assert before >= 100.0
    with main_job._timed("eval", seconds, print) as stage:
        stage.reused = True
    assert StageSeconds(tmp_path).all() == {"eval": before}


def test_the_first_loss_is_timed_after_a_start_without_one_and_recorded_at_once(tmp_path: Path) -> None:
    metrics, stages = tmp_path / "metrics.jsonl", tmp_path / "stages.json"
    metrics.write_text("")  # an earlier start was killed before its first row
    with main_job._FirstLoss(tmp_path, StageSeconds(tmp_path), time.time() - 50.0):
        metrics.write_text('{"step": 1}\n')
        deadline = time.monotonic() + 10.0
        while not stages.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(stages.read_text())["first_loss"] == pytest.approx(50.0, abs=10.0)
    recorded = stages.read_text()
    with main_job._FirstLoss(tmp_path, StageSeconds(tmp_path), time.time()):
        time.sleep(0.1)
    assert stages.read_text() == recorded


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["mesh.dp=2"], "needs 2 ranks, one per CUDA device"),
        (["mesh.dp=", 'evals.tasks=["niah_single_2"]', "evals.ruler_essay=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_the_machine_is_refused_before_the_text_is_prepared(
    overrides: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("prepared before the preflight")

    monkeypatch.setattr("data_pipeline.job.prepare", never)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises((ValueError, OSError), match=words):
        main_job.main_job(recipe_in(tmp_path, *overrides), tmp_path / "run", say=print)
