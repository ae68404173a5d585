"""Starts the ranks of a run on this machine with torchrun's agent, and turns a failed rank into one line."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.ending import TerminatedError, ended, handlers_kept, newest_step
from launch.failures import (
    MISUSE,
    RankError,
    cause_of,
    forget_failures,
    log_folder,
    read_failures,
    record_failure,
    report,
    same_everywhere,
    silent_end,
    where,
)
from trellis_dist.training.job import EXIT_TERMINATED
from trellis_dist.training.termination import SIGNALS

__all__ = [
    "AGENT",
    "ASKED",
    "MALLOC",
    "PASSED_ON",
    "SLACK_S",
    "RankError",
    "TerminatedError",
    "explain",
    "log_folder",
    "memory_of_killed",
    "record_failure",
    "run_ranks",
    "share_machine",
    "silence_the_agent",
    "under_torchrun",
]

CHECKOUT = Path(__file__).resolve().parents[1]

# Set for ranks whose agent is ours (launch.clusters.run_agent): they end with it.
AGENT = "TRELLIS_AGENT"
# What the agent passes on to the ranks. The last one is what a scheduler can be told to send before the end.
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# After the grace period, for a rank to be gone once its save is.
SLACK_S = 5
# glibc hands a freed activation back to the system and faults it in again at the next step: keeping it made a
# CPU step of the quickstart 8-10% shorter. But not buffers as large as all gradients: with 1 GiB for both a
# rank whose tensors take 1.5 GB took 2.4, with these 2.0, and the quickstart's step is no longer
# (docs/planning.md). 32 MiB is the most that mallopt(3) allows. Other C libraries ignore these names.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_MMAP_THRESHOLD_": 2**25}
# With which ranks end that were asked to; before they have a handler, by the signal itself.
ASKED = (EXIT_TERMINATED, *(-number for number in SIGNALS))


def under_torchrun() -> bool:
    """True in a process that torchrun, or a scheduler that sets its variables, started as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(
    count: int,
    *,
    run_dir: Path,
    arguments: Sequence[str],
    module: str = "launch.worker",
    grace_s: float = 30.0,
) -> None:
    """Run ``python -m MODULE ARGUMENTS`` as ``count`` ranks and wait; rank 0 keeps this terminal.

    SIGTERM and SIGUSR1 are passed on to the ranks, which have ``grace_s`` seconds to save and end (torch 2.11
    always gives 30) before they are killed.

    Raises:
        RankError: a rank failed; the message is that rank's own error line.
        TerminatedError: SIGTERM or SIGUSR1; the ranks saved and ended.
        KeyboardInterrupt: interrupted; the ranks were stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    _prepare_environment(count, grace_s=grace_s)
    forget_failures(run_dir)
    silence_the_agent()
    before = newest_step(run_dir)
    # The loopback address by its number: the machine's own host name need not resolve.
    here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
    passed_on = f"--signals-to-handle={','.join(number.name for number in PASSED_ON)}"
    try:
        with handlers_kept(PASSED_ON):
            torchrun([*here, passed_on, "-m", module, *arguments])
    except ChildFailedError as error:
        if {failure.exitcode for failure in error.failures.values()} <= set(ASKED):
            raise _asked("a signal to its ranks", run_dir, before=before, count=count) from None
        raise explain(error, run_dir, count=count) from None
    except SignalException as error:
        if error.sigval not in SIGNALS:
            raise KeyboardInterrupt from None
        raise _asked(signal.Signals(error.sigval).name, run_dir, before=before, count=count) from None


def _asked(name: str, run_dir: Path, *, before: int, count: int) -> TerminatedError | RankError:
    """How ranks ended that were asked to: as they should, or with a save that failed."""
    if any(not failure.echo for failure in read_failures(run_dir)):
        return _recorded(run_dir, count=count)
    return ended(name, run_dir, before=before)


def silence_the_agent() -> None:
    """The agent's account of a failed rank is a page of log lines; the rank has written a better one."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _prepare_environment(count: int, *, grace_s: float) -> None:
    """The shares of the machine, one machine's network, the grace, and our rooms first on the path."""
    share_machine(count)
    if sys.platform == "linux":
        # gloo would look up the machine's own host name, which need not resolve; all ranks are here.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Not the option --shutdown-timeout, which torch 2.11 would refuse.
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(grace_s) + SLACK_S)
    # `python -m` would look in the caller's folder first, and run whatever is called launch or evals there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    path = os.environ.get("PYTHONPATH", "")
    if str(CHECKOUT) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), path]))


def share_machine(count: int) -> None:
    """Divide the cores among ``count`` ranks (torchrun would warn and give each one); let them keep memory.

    Sets the environment that the ranks inherit, where it says nothing yet.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    for name, size in MALLOC.items():
        os.environ.setdefault(name, str(size))


def _cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def explain(error: Any, run_dir: Path, *, count: int) -> RankError:
    """The one of ``count`` ranks that failed by itself: the earliest to end, or who knows why others failed.

    The others only lost their peer and say so in words that help nobody, or hung and were killed at the end.
    """
    records = read_failures(run_dir)
    if any(failure.named and not failure.echo for failure in records):
        return _recorded(run_dir, count=count)  # a hang: who judged it may have ended the rank it is about
    recorded = {failure.rank for failure in records}
    rank, first = min(
        error.failures.items(),
        key=lambda item: (item[1].timestamp, _effect(item[1].exitcode, silent=item[0] not in recorded)),
    )
    if rank in recorded:
        return _recorded(run_dir, count=count)
    logs = log_folder(run_dir)
    _, doing = where(run_dir, rank, pid=first.pid)
    who, what = f"rank {rank} on {socket.gethostname()}", silent_end(first.exitcode)
    memory = memory_of_killed(run_dir, first.exitcode, here=count)
    return RankError(
        f"{who}: {what}{doing}; logs of the ranks are in {logs}{memory}",
        f"no traceback was recorded in {logs}",
        restartable=first.exitcode != MISUSE,
    )


def memory_of_killed(run_dir: Path, status: int, *, here: int) -> str:
    """``; `` and what the planner says of the memory of one of ``here`` ranks on this machine, for SIGKILL.

    Empty for another end, and where there is no recipe to plan.
    """
    if status != -signal.SIGKILL:
        return ""
    with contextlib.suppress(Exception):  # advice must not hide the error
        from launch.planning.advice import killed_advice
        from launch.run_folder import recipe_of_run

        return f"; {killed_advice(recipe_of_run(run_dir), here=here)}"
    return ""


def _effect(status: int, *, silent: bool) -> int:
    """Which of two ends within a second (the agent's clock) is rather the effect of the other: the higher."""
    if silent and status in ASKED:  # by torchrun's agent; it waits half a minute before it kills
        return 3
    if not silent:  # perhaps only in words that a peer is gone
        return 2
    return 0 if status < 0 else 1


def _recorded(run_dir: Path, *, count: int) -> RankError:
    """The first record, in the order of time, that is no echo; there are ``count`` ranks."""
    failures = read_failures(run_dir)
    cause = cause_of(failures)
    # What all ranks were refused for, such as a recipe, is nothing that happened to one of them.
    plain = same_everywhere(failures, ranks=count) and not cause.restartable
    line = cause.message if plain else report(cause)
    return RankError(line, cause.detail, restartable=cause.restartable)
