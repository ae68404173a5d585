"""Runs of an experiment: say what they are (`RunSpec`), perform them, read one JSON per run.

    specs = [RunSpec(name=f"trellis-s{seed}", recipe="quickstart",
                     overrides=(f"training.seed={seed}", f"data.seed={seed}")) for seed in (0, 1, 2)]
    outcome = perform_all(specs, Path("study"), jobs=2, minutes=50)   # again until outcome.left is empty
    outcome.results["trellis-s0"]["validation"]["loss"]

A result's keys are those of ``launch.experiments.result.collect``.
"""

from __future__ import annotations

from launch.experiments.children import CutError, FailedError
from launch.experiments.perform import perform
from launch.experiments.pool import Outcome, perform_all
from launch.experiments.spec import RunSpec, assignments

__all__ = ["CutError", "FailedError", "Outcome", "RunSpec", "assignments", "perform", "perform_all"]
