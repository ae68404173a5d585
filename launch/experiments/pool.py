"""Several runs at once on one machine, in slices of time that go on where the last one ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.ending import handlers_kept
from launch.experiments.children import CutError, FailedError, Slice
from launch.experiments.perform import Workshop, perform_in, prepare_shards
from launch.experiments.result import known_result
from launch.experiments.spec import RunSpec
from launch.experiments.text import repeats

__all__ = ["Outcome", "default_jobs", "perform_all"]

_ENDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Outcome:
    """What a slice did.

    Attributes:
        results: run -> its result, of every run that is done.
        left: runs that are not, in their order.
        failed: run -> its error line; they are among ``left`` too.
        asked: a signal ended the slice.
    """

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    asked: bool = False


def default_jobs() -> int:
    """Runs at once: one on a machine with a GPU, else one per core."""
    import torch

    return 1 if torch.cuda.is_available() else _cores()


def perform_all(
    specs: Sequence[RunSpec],
    root: Path,
    *,
    results: Path | None = None,
    jobs: int | None = None,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Perform every spec that has no result yet, ``jobs`` at a time, each on its share of the cores.

    After ``minutes``, or on SIGTERM, SIGUSR1 or Ctrl-C, runs at work save and end, and the same call goes
    on with them. A run that fails stops no other one.

    Raises:
        ValueError: two specs of one name, or a folder that holds another run of a spec's name: before
            anything starts.
        OSError: a folder cannot be written.
    """
    jobs = default_jobs() if jobs is None else jobs
    _check(specs, jobs)
    threads = max(_cores() // jobs, 1)
    shop = Workshop(root=root, results=results, slice_=Slice(minutes), threads=threads, say=say)
    known = {spec.name: known_result(shop.result(spec), spec) for spec in specs}
    missing = [spec for spec in specs if known[spec.name] is None]
    outcome = Outcome(results={name: found for name, found in known.items() if found is not None})
    with _signals_end(shop.slice_):
        _prepare(shop, missing, outcome)
        for line in repeats(missing):
            say(line)
        if not outcome.failed:
            _perform(shop, missing, jobs, outcome)
    outcome.asked = shop.slice_.asked
    outcome.left = [spec.name for spec in specs if spec.name not in outcome.results]
    return outcome


def _check(specs: Sequence[RunSpec], jobs: int) -> None:
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: use 1 or more runs at once")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two runs are named {twice[0]}: give each a name of its own")


def _prepare(shop: Workshop, specs: Sequence[RunSpec], outcome: Outcome) -> None:
    """Shards first, one data set after the other: each takes all cores."""
    for spec in specs:
        try:
            prepare_shards(shop, spec)
        except CutError:
            return
        except FailedError as error:
            outcome.failed[spec.name] = str(error)
            return


def _perform(shop: Workshop, specs: Sequence[RunSpec], jobs: int, outcome: Outcome) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        futures = {spec.name: pool.submit(_one, shop, spec) for spec in specs}
        try:
            _gather(futures, shop, outcome)
        except BaseException:
            shop.slice_.end()
            raise


def _one(shop: Workshop, spec: RunSpec) -> dict[str, Any] | None:
    if shop.slice_.over:
        return None
    try:
        return perform_in(shop, spec)
    except CutError:
        return None


def _gather(futures: dict[str, Future[dict[str, Any] | None]], shop: Workshop, outcome: Outcome) -> None:
    for name, future in futures.items():
        try:
            found = future.result()
        except (FailedError, ValueError, OSError) as error:
            outcome.failed[name] = str(error)
            shop.say(f"{name}: failed: {error}")
            continue
        if found is not None:
            outcome.results[name] = found


@contextlib.contextmanager
def _signals_end(slice_: Slice) -> Iterator[None]:
    """Signals end the slice, which saves; in another thread than the main one they do what they did."""
    with handlers_kept(_ENDS):
        if threading.current_thread() is threading.main_thread():
            for number in _ENDS:
                signal.signal(number, lambda *_: slice_.end())
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0))
