"""A run keeps its recipe; the seconds of its stages survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.recipe import load_recipe
from launch.run_folder import StageSeconds, claim_run, recipe_of_run

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
    claim_run(tmp_path, load_recipe(BASE, ["logging.interval=1", "evals.needle_samples=3"]))
    assert recipe_of_run(tmp_path).logging.interval == 1


def test_seconds_of_stages_survive_a_new_start(tmp_path: Path) -> None:
    StageSeconds(tmp_path).record("prepare", 1.5)
    StageSeconds(tmp_path).record("eval", 2.0)
    assert StageSeconds(tmp_path).all() == {"prepare": 1.5, "eval": 2.0}
