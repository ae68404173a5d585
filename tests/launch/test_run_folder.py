"""A run keeps its recipe; the seconds of its stages survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.recipe import load_recipe, resolve
from launch.run_folder import StageSeconds, claim_run, recipe_of_run
from trellis_dist.files import write_json
from trellis_dist.training import run_lock

BASE = str(Path(__file__).with_name("base.toml"))


def test_a_run_keeps_its_recipe_once_it_has_a_checkpoint(tmp_path: Path) -> None:
    claim_run(tmp_path, load_recipe(BASE))
    claim_run(tmp_path, load_recipe(BASE, ["optimizer.lr=1e-3"]))  # nothing trained yet: free to change
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"optimizer.lr 0.001 -> 0.002.*--run-dir"):
        claim_run(tmp_path, load_recipe(BASE, ["optimizer.lr=2e-3"]))
    assert recipe_of_run(tmp_path).optimizer.lr == 1e-3


def test_what_decides_no_weight_may_change(tmp_path: Path) -> None:
    claim_run(tmp_path, load_recipe(BASE))
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    claim_run(tmp_path, load_recipe(BASE, ["logging.interval=1", "evals.ruler_samples=3"]))
    assert recipe_of_run(tmp_path).logging.interval == 1


def test_how_long_to_wait_and_how_often_to_skip_may_change(tmp_path: Path) -> None:
    claim_run(tmp_path, load_recipe(BASE))
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    free = ["training.max_skipped_steps=3", "training.step_timeout_s=9", "training.first_step_timeout_s=9"]
    claim_run(tmp_path, load_recipe(BASE, free))
    assert recipe_of_run(tmp_path).training.max_skipped_steps == 3


def test_a_key_that_a_later_version_added_counts_with_its_default(tmp_path: Path) -> None:
    saved = resolve(load_recipe(BASE))
    del saved["optimizer"]["clip_norm"]
    write_json(tmp_path / "recipe.json", saved)
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    claim_run(tmp_path, load_recipe(BASE))
    with pytest.raises(ValueError, match=r"optimizer.clip_norm 1.0 -> 2.0"):
        claim_run(tmp_path, load_recipe(BASE, ["optimizer.clip_norm=2"]))


def test_a_saved_recipe_names_its_data_set_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    claim_run(tmp_path / "run", load_recipe(BASE))
    assert recipe_of_run(tmp_path / "run").data.directory == str(tmp_path / "shards" / "base")


def test_seconds_of_an_interrupted_stage_are_added_up(tmp_path: Path) -> None:
    for seconds in (1.5, 2.0):
        StageSeconds(tmp_path).add("train", seconds)
    assert StageSeconds(tmp_path).all() == {"train": 3.5}


def test_seconds_of_stages_survive_a_new_start(tmp_path: Path) -> None:
    StageSeconds(tmp_path).record("prepare", 1.5)
    StageSeconds(tmp_path).record("eval", 2.0)
    assert StageSeconds(tmp_path).all() == {"prepare": 1.5, "eval": 2.0}


def test_the_recipe_of_a_job_at_work_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.3)
    claim_run(tmp_path, load_recipe(BASE))
    before = (tmp_path / "recipe.json").read_bytes()
    with run_lock.RunLock(tmp_path) as at_work:
        at_work.take()
        with pytest.raises(ValueError, match="another process trains"):
            claim_run(tmp_path, load_recipe(BASE, ["optimizer.lr=1e-3"]))
        assert (tmp_path / "recipe.json").read_bytes() == before
    claim_run(tmp_path, load_recipe(BASE, ["optimizer.lr=1e-3"]))
