"""`trellis train`: preflight, then the ranks."""

from __future__ import annotations

import os
from pathlib import Path

from launch import preflight
from launch.ranks import TerminatedError, run_ranks, under_torchrun
from launch.recipe import Recipe
from launch.run_folder import anchored, claim_run
from launch.worker import train_rank
from trellis_dist.training.job import EXIT_TERMINATED, Resume

__all__ = ["train"]


def train(recipe: Recipe, run_dir: Path, *, resume: Resume = "auto", stop_at_step: int | None = None) -> None:
    """Train (or continue) the run in ``run_dir`` on this machine, starting as many ranks as its mesh needs.

    Under torchrun this process is one of the ranks already, and trains as that rank.

    Raises:
        ValueError, OSError: what a user can change, one line each.
        launch.ranks.RankError: a rank failed; the message is that rank's error.
        launch.ranks.TerminatedError: SIGTERM; the run was saved.
    """
    recipe = anchored(preflight.fit_to_machine(recipe, say=_say))
    if under_torchrun():
        if os.environ["RANK"] == "0":
            claim_run(run_dir, recipe)
        result = train_rank(recipe, run_dir, resume=resume, stop_at_step=stop_at_step)
        if result.exit_status == EXIT_TERMINATED:
            raise TerminatedError(f"ended by SIGTERM; start {run_dir} again to resume it")
        return
    if resume == "require" and not any((run_dir / "checkpoints").glob("step-*")):
        raise FileNotFoundError(
            f"nothing to resume in {run_dir}: it holds no checkpoint; start without --resume"
        )
    preflight.check_dataset(recipe)
    ranks = preflight.check_machine(recipe, run_dir)
    saved = claim_run(run_dir, recipe)
    arguments = [f"--recipe={saved}", f"--run-dir={run_dir}", f"--resume={resume}"]
    if stop_at_step is not None:
        arguments.append(f"--stop-at-step={stop_at_step}")
    run_ranks(ranks, run_dir=run_dir, arguments=arguments)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"trellis: {line}", flush=True)
