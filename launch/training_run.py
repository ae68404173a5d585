"""`trellis train`: preflight, then the ranks; or, where torchrun started this process, one of them."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path

from launch import preflight
from launch.aftermath import record_failed_start, reported, sum_up_failure, summed_up, write_page
from launch.ending import (
    asked_to_end,
    end_process,
    ended,
    newest_step,
    on_termination,
)
from launch.failures import (
    Failure,
    address_of,
    cause_of,
    claim_words,
    forget_failure,
    lost_addresses,
    read_failures,
    report,
    where,
)
from launch.ranks import AGENT, run_ranks, under_torchrun
from launch.recipe import Recipe
from launch.run_folder import anchored, claim_run
from launch.supervise import supervise
from launch.worker import ECHO_SECONDS, end_with_launcher, leave_failure, leave_hang, train_rank
from trellis_dist.training.job import EXIT_TERMINATED, Resume, TrainResult

__all__ = ["train"]


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    stop_at_step: int | None = None,
    max_restarts: int = 0,
) -> None:
    """Train (or continue) the run in ``run_dir`` on this machine, starting as many ranks as its mesh needs.

    After a failure that a restart can cure the ranks are started again, ``max_restarts`` times without
    progress. Under torchrun this process is one of the ranks already, and trains as that rank; after a
    failure it does not return: the rank that knows the cause says it, and the process ends with status 1.

    Raises:
        ValueError, OSError: what a user can change, one line each.
        launch.failures.RankError: a rank failed; the message is that rank's error.
        launch.ending.TerminatedError: SIGTERM or SIGUSR1; the run was saved.
    """
    with asked_to_end(run_dir):
        if under_torchrun():
            if max_restarts:
                raise ValueError(
                    f"--max-restarts {max_restarts}: torchrun started this rank, so it restarts it too; give "
                    "the option to torchrun, or to launch/torchrun/train.sh before the recipe"
                )
            return _train_as_rank(recipe, run_dir, resume=resume, stop_at_step=stop_at_step)
        recipe = anchored(preflight.fit_to_machine(recipe, say=_say))
        if resume == "require" and not any((run_dir / "checkpoints").glob("step-*")):
            raise FileNotFoundError(
                f"nothing to resume in {run_dir}: it holds no checkpoint; start without --resume"
            )
        preflight.check_dataset(recipe)
        ranks = preflight.check_machine(recipe, run_dir, say=_say)
        saved = claim_run(run_dir, recipe)
        arguments = [f"--recipe={saved}", f"--run-dir={run_dir}", f"--resume={resume}"]
        if stop_at_step is not None:
            arguments.append(f"--stop-at-step={stop_at_step}")
        grace_s = recipe.checkpoint.grace_s
        start = functools.partial(run_ranks, ranks, run_dir=run_dir, arguments=arguments, grace_s=grace_s)
        with summed_up(recipe, run_dir):
            supervise(reported(start, run_dir), run_dir=run_dir, max_restarts=max_restarts)
        return None


def _train_as_rank(recipe: Recipe, run_dir: Path, *, resume: Resume, stop_at_step: int | None) -> None:
    if AGENT in os.environ:
        end_with_launcher()
    rank = int(os.environ["RANK"])
    _refuse_to_repeat(run_dir)
    forget_failure(run_dir, rank)
    before = newest_step(run_dir)
    try:
        result = _start_as_rank(recipe, run_dir, resume=resume, stop_at_step=stop_at_step)
    except Exception as error:
        # torchrun's SIGTERM, with which it ends all ranks after the first, waits for the report.
        on_termination(lambda *_: None)
        _tell_once(leave_failure(error, run_dir=run_dir, rank=rank, recipe=recipe), run_dir, recipe)
        end_process(1)
    if rank == 0:
        # The other ranks end now, for which torchrun may end this one too: it has the run's page to write.
        on_termination(lambda *_: None)
        write_page(run_dir)
    if result.exit_status == EXIT_TERMINATED:
        if rank > 0:
            end_process(EXIT_TERMINATED)  # rank 0 says it
        raise ended("a signal", run_dir, before=before)


def _start_as_rank(recipe: Recipe, run_dir: Path, *, resume: Resume, stop_at_step: int | None) -> TrainResult:
    recipe = anchored(preflight.fit_to_machine(recipe, say=_say))
    if os.environ["RANK"] == "0":
        claim_run(run_dir, recipe)
    rank = int(os.environ["RANK"])

    def report(message: str, echo: bool) -> None:
        failure = leave_hang(run_dir, rank, message, echo)
        if not echo:  # judged by one rank for all; the page of the run takes longer than it has
            _tell(message, failure, run_dir, page=False)

    return train_rank(recipe, run_dir, resume=resume, stop_at_step=stop_at_step, report=report)


def _refuse_to_repeat(run_dir: Path) -> None:
    """End a rank that torchrun started again after a failure which the restart would only repeat.

    Each rank removes its own record only after this, so all of them find the one that ends them.
    """
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    earlier = [
        failure
        for failure in read_failures(run_dir)
        if failure.run_id == run_id and failure.restart < restart
        if not (failure.restartable or failure.echo)
    ]
    if not earlier:
        return
    cause = cause_of(earlier)
    if claim_words(run_dir, cause):
        _tell(f"not started again, because a restart would repeat this: {report(cause)}", cause, run_dir)
    end_process(1)


def _tell_once(own: Failure, run_dir: Path, recipe: Recipe) -> None:
    """Say why the ranks of this start failed if this is the rank to say it; the others stay quiet.

    All ranks wait for each other's records and then choose alike.
    """
    time.sleep(ECHO_SECONDS)
    here = (own.run_id, own.restart)
    failures = [failure for failure in read_failures(run_dir) if (failure.run_id, failure.restart) == here]
    cause = cause_of(failures or [own])  # none, where they could not be written
    if cause.rank == own.rank:
        line = report(cause) + (_silent_ranks(failures, run_dir) if cause.echo else "")
        sum_up_failure(recipe, run_dir, line)
        _tell(line, cause, run_dir)


def _silent_ranks(failures: list[Failure], run_dir: Path) -> str:
    """Those that left no record, one of which died: where each was last.

    Others may be silent because they still wait for it: where a connection was lost tells which is meant.
    """
    spoke = {failure.rank for failure in failures}
    silent = [rank for rank in range(int(os.environ["WORLD_SIZE"])) if rank not in spoke]
    lost = lost_addresses(failure.message for failure in failures)
    silent = [rank for rank in silent if address_of(run_dir, rank) in lost] or silent
    places = ["rank {}{}{}".format(rank, *where(run_dir, rank)) for rank in silent]
    return f"; no word from {', '.join(places)}" if places else ""


def _tell(line: str, failure: Failure, run_dir: Path, *, page: bool = True) -> None:
    if "--debug" in sys.argv:  # which the command line takes for itself, and this process ends before it
        print(failure.detail, file=sys.stderr)
    print(f"trellis: error: {line}", file=sys.stderr, flush=True)
    record_failed_start(run_dir, line, report=page)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"trellis: {line}", flush=True)
