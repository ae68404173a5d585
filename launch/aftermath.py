"""What a start leaves when it is over: its failure among the events, RUN/training.html, a closing summary.

A start that ends well sums itself up, in rank 0; of one that failed its launcher does, from the run folder.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.failures import RankError
from launch.recipe import Recipe

__all__ = ["record_failed_start", "reported", "sum_up_failure", "summed_up", "write_page"]


def reported(start: Callable[[], None], run_dir: Path) -> Callable[[], None]:
    """``start``, after which its failure is recorded and the run's page is written, however it ended."""

    def start_and_report() -> None:
        try:
            start()
        except RankError as error:
            record_failed_start(run_dir, str(error), report=False)
            raise
        finally:
            write_page(run_dir)

    return start_and_report


@contextlib.contextmanager
def summed_up(recipe: Recipe, run_dir: Path) -> Iterator[None]:
    """Print the closing summary of a run that fails in here, on standard error, before its error."""
    try:
        yield
    except RankError as error:
        sum_up_failure(recipe, run_dir, str(error))
        raise


def sum_up_failure(recipe: Recipe, run_dir: Path, error: str) -> None:
    """Print the closing summary of a run that failed with ``error``; what goes wrong must not hide that."""
    with contextlib.suppress(Exception):
        _sum_up(recipe, run_dir, error)


def _sum_up(recipe: Recipe, run_dir: Path, error: str) -> None:
    from trellis_dist.training.closing import close_run
    from trellis_dist.training.starts import read_starts

    if not read_starts(run_dir):
        return  # refused before there was anything to sum up
    training = recipe.training
    closing = close_run(
        run_dir,
        outcome="failed",
        steps=training.steps,
        tokens_per_step=training.global_batch_tokens,
        error=error,
    )
    print(closing.text, file=sys.stderr, flush=True)


def record_failed_start(run_dir: Path, error: str, *, report: bool = True) -> None:
    """Note among the run's events why its newest start failed; with ``report`` write its page too.

    A disk that refuses must not hide the error itself.
    """
    from trellis_dist.training.console import append_event

    with contextlib.suppress(OSError):
        append_event(run_dir / "console.jsonl", "failure", error, outcome="failed")
    if report:
        write_page(run_dir)


def write_page(run_dir: Path) -> None:
    """Write RUN/training.html; that it cannot be written is said, and changes nothing else."""
    from launch.run_report import write_training_report

    try:
        write_training_report(run_dir)
    except Exception as error:
        print(f"trellis: no {run_dir / 'training.html'}: {error}", file=sys.stderr, flush=True)
