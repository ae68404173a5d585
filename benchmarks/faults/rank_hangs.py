"""Rows 12 and 13: a rank that is stopped, or goes past a collective, in a real `trellis train`.

python -m benchmarks.faults.rank_hangs ...     a rank (launch.worker) that skips what TRELLIS_FAULT says
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.rank_job import ENGINES, Started, command
from benchmarks.faults.row import Outcome
from launch.failures import Failure, cause_of, read_failures

__all__ = ["SKIPPED", "skip_collective", "stop_rank"]

TIMEOUT_S = 6.0
WITHIN_S = 5.0
FAULT = "TRELLIS_FAULT"
# Starts the command with this module in place of launch.worker.
LAUNCHER = """
import functools, sys
from launch import cli, training_run
training_run.run_ranks = functools.partial(training_run.run_ranks, module="benchmarks.faults.rank_hangs")
sys.exit(cli.main(sys.argv[1:]))
"""
# What a rank goes past: attributes of modules, and the operation in which the others then wait.
SKIPPED = {
    "agreement": ("trellis_dist.training.loop", "gather_scalars", "agreement between the ranks"),
    "loss": ("trellis_dist.training.collectives", "sum_scalars", "sum of the losses"),
    "gradients": (
        "trellis_dist.training.engines.local",
        "sum_replica_gradients",
        "reduction of the gradients",
    ),
}


def _values(ranks: int) -> dict[str, Any]:
    return {
        **ENGINES["local"],
        "mesh.dp": ranks,
        "training.global_batch_tokens": 32 * ranks,
        "training.steps": 100_000,
        "training.validation_interval": 0,
        "training.step_timeout_s": TIMEOUT_S,
        "checkpoint.interval": 100_000,
        "checkpoint.grace_s": 1.0,
    }


def stop_rank(folder: Path, index: int) -> Outcome:
    """SIGSTOP a rank of two to four, rank 0 among them; seconds after the timeout until it is named."""
    draw, ranks = random.Random(f"stop {index}"), 2 + index % 3
    victim, run_dir = index // 3 % ranks, folder / "run"
    with command(run_dir, folder.parent, _values(ranks)) as run:
        page = run.wait_for_step(victim, draw.randint(2, 30))
        time.sleep(draw.uniform(0.0, 0.2))
        os.kill(page.pid, signal.SIGSTOP)
        stopped = time.time()
        failure = _named(run)
        status, told = run.end(), time.time()
        said = run.said
    late = failure.at - stopped - TIMEOUT_S
    line = _error(said)
    wrong = ""
    if f"rank {victim} (" not in failure.message or "has not been heard of" not in failure.message:
        wrong = f"not named: {failure.message}"
    elif late > WITHIN_S:
        wrong = f"named {late:.1f} s after the timeout"
    elif status != 1 or failure.message not in line:
        wrong = f"exit status {status}, and the command said: {line}"
    return Outcome(
        not wrong,
        f"rank {victim} of {ranks}{wrong and ': ' + wrong}",
        {
            "seconds after the timeout": round(late, 2),
            "seconds until the command ended": round(told - stopped, 1),
        },
    )


def _named(run: Started) -> Failure:
    """The record of the rank that judged the hang."""
    found: list[Failure] = []

    def there() -> bool:
        found[:] = [failure for failure in read_failures(run.run_dir) if not failure.echo]
        return bool(found)

    run.wait_until(there, "a report of the hang")
    return cause_of(found)


def _error(said: str) -> str:
    return " ".join(line for line in said.splitlines() if line.startswith("trellis: error:"))


def skip_collective(folder: Path, index: int) -> Outcome:
    """A rank of three goes past one collective of a step; it and the operation are to be named."""
    draw, victim, run_dir = random.Random(f"skip {index}"), (index + 1) % 3, folder / "run"
    kind = list(SKIPPED)[index % len(SKIPPED)]
    fault = {"rank": victim, "kind": kind, "call": draw.randint(5, 40)}
    variables = {FAULT: json.dumps(fault)}
    with command(run_dir, folder.parent, _values(3), code=LAUNCHER, environment=variables) as run:
        status = run.end()
        said = run.said
    line = _error(said)
    wrong = ""
    if status != 1 or f"rank {victim} (" not in line or " is not in " not in line:
        wrong = f"by rank {victim}, exit status {status}: {line or said[-300:]}"
    return Outcome(not wrong, f"{kind} skipped{wrong and ': ' + wrong}")


def _skip(module: Any, name: str, *, call: int) -> None:
    """Have the ``call``-th call of a collective answered as if nobody else were there."""
    real: Callable[..., Any] = getattr(module, name)
    calls = 0

    def wrapped(values: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return real(values, *rest)
        if name == "gather_scalars":
            return [list(values)] * int(os.environ["WORLD_SIZE"])
        return list(values)

    setattr(module, name, wrapped)


def main() -> None:
    """Be a rank with a fault."""
    import importlib

    from launch import worker

    fault = json.loads(os.environ[FAULT])
    if int(os.environ["RANK"]) == fault["rank"]:
        module, name, _ = SKIPPED[fault["kind"]]
        _skip(importlib.import_module(module), name, call=fault["call"])
    worker.process()


if __name__ == "__main__":
    main()
