"""The run folder as the launcher sees it: its recipe, and how long the stages of the main job took."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.recipe import Recipe, differences, parse_recipe, resolve
from trellis_dist.files import read_json, write_json
from trellis_dist.training.run_lock import RunLock

__all__ = ["StageSeconds", "anchored", "claim_run", "free_to_change", "recipe_of_run"]

# What may change between two starts of one run: nothing that decides which weights come out of good steps.
_FREE = (
    "name",
    "description",
    "logging.",
    "checkpoint.",
    "evals.",
    "data.directory",
    "mesh.",
    "training.threads",
)
_FREE_TRAINING = (
    "training.micro_batch",
    "training.validation_interval",
    "training.validation_rows",
    "training.max_skipped_steps",
    "training.spike_",
    "training.max_rollbacks",
    "training.replica_check_interval",
    "training.straggler_ratio",
    "training.first_step_timeout_s",
    "training.step_timeout_s",
    # A run that has a checkpoint resumes it; where its first weights came from is in there.
    "training.init_from",
)


def free_to_change(key: str) -> bool:
    """Whether a dotted key may change between two starts of one run: it does not decide its weights."""
    return key.startswith((*_FREE, *_FREE_TRAINING))


def recipe_of_run(run_dir: Path) -> Recipe:
    """The recipe saved in a run folder.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is no run folder: it has no recipe.json; give the folder of a trained run"
        )
    return parse_recipe(read_json(path), source=str(path))


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with ``data.directory`` absolute, so that its run can be used from any working directory."""
    directory = os.path.abspath(recipe.data.directory)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, directory=directory))


def claim_run(run_dir: Path, recipe: Recipe) -> Path:
    """Save the resolved recipe in ``run_dir`` and return its path; a run with checkpoints keeps its recipe.

    It is written under the lock that training holds: the recipe of a job at work is not replaced.

    Raises:
        ValueError: the folder's run was trained with other values, which the message lists, or another
            process trains in it.
        OSError: the folder is not writable.
    """
    with RunLock(run_dir) as lock:
        lock.take()
        return _claim(run_dir, recipe)


def _claim(run_dir: Path, recipe: Recipe) -> Path:
    path = run_dir / "recipe.json"
    resolved = resolve(anchored(recipe))
    if path.is_file() and any((run_dir / "checkpoints").glob("step-*")):
        # Parsed, so that a key which a later version added counts with its default.
        before = resolve(parse_recipe(read_json(path), source=str(path)))
        changed = {
            key: values for key, values in differences(before, resolved).items() if not free_to_change(key)
        }
        if changed:
            listed = ", ".join(
                f"{key} {_show(old)} -> {_show(new)}" for key, (old, new) in sorted(changed.items())
            )
            raise ValueError(f"{run_dir} holds a run with another recipe ({listed}): use another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, resolved)
    return path


def _show(value: Any) -> str:
    return json.dumps(value)


class StageSeconds:
    """``RUN/stages.json``: how long each stage of the main job took, over several starts."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "stages.json"
        self._seconds: dict[str, float] = read_json(self._path) if self._path.is_file() else {}

    def record(self, stage: str, seconds: float) -> None:
        """Set the seconds of a stage, durably."""
        self._seconds[stage] = round(seconds, 3)
        write_json(self._path, self._seconds)

    def add(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage, durably: what an interrupted start spent on it counts."""
        self.record(stage, self._seconds.get(stage, 0.0) + seconds)

    def all(self) -> Mapping[str, float]:
        """Stage -> seconds, of the stages that were recorded."""
        return dict(self._seconds)
