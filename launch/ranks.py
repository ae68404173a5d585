"""Starts the ranks of a run on this machine with torchrun's agent, and turns a failed rank into one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trellis_dist.files import read_json, write_json
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = [
    "RankError",
    "TerminatedError",
    "explain",
    "is_echo",
    "log_folder",
    "record_failure",
    "run_ranks",
    "under_torchrun",
]

# With which the watchdog of a rank ends it; any other failure with this status leaves a record.
WATCHDOG = 1

CHECKOUT = Path(__file__).resolve().parents[1]


class TerminatedError(RuntimeError):
    """The run was asked to end (SIGTERM), saved a checkpoint and ended; starting it again resumes it."""


class RankError(RuntimeError):
    """A rank failed; ``detail`` is its traceback, or a pointer to its log."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail


def under_torchrun() -> bool:
    """True in a process that torchrun, or a scheduler that sets its variables, started as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def log_folder(run_dir: Path) -> Path:
    """Where the output of ranks other than 0, and the failure of any rank, is written."""
    return run_dir / "logs"


def run_ranks(count: int, *, run_dir: Path, arguments: Sequence[str], module: str = "launch.worker") -> None:
    """Run ``python -m MODULE ARGUMENTS`` as ``count`` ranks and wait; rank 0 keeps this terminal.

    Raises:
        RankError: a rank failed; the message is that rank's own error line.
        TerminatedError: SIGTERM; the ranks saved and ended.
        KeyboardInterrupt: interrupted; the ranks were stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    _prepare_environment(count)
    for stale in log_folder(run_dir).glob("failure-rank-*.json"):
        stale.unlink()
    _silence_the_agent()
    try:
        # The loopback address by its number: the machine's own host name need not resolve.
        here = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
        torchrun([*here, "-m", module, *arguments])
    except ChildFailedError as error:
        if {failure.exitcode for failure in error.failures.values()} == {EXIT_TERMINATED}:
            raise TerminatedError(f"ended by SIGTERM; start {run_dir} again to resume it") from None
        raise explain(error, run_dir) from None
    except SignalException as error:
        if error.sigval == signal.SIGTERM:
            raise TerminatedError(f"ended by SIGTERM; start {run_dir} again to resume it") from None
        raise KeyboardInterrupt from None


def _record(run_dir: Path, rank: int) -> Path:
    return log_folder(run_dir) / f"failure-rank-{rank:05d}.json"


def is_echo(message: str) -> bool:
    """True for what a rank says when it only agreed to fail with another one, which knows the cause."""
    return "another rank" in message


def record_failure(run_dir: Path, *, rank: int, message: str, detail: str, echo: bool = False) -> None:
    """Leave a rank's error where the launcher finds it; a full disk must not hide the error itself.

    ``echo`` says that this rank only agreed to fail with another one, which knows the cause.
    """
    folder = log_folder(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = {"rank": rank, "message": message, "detail": detail, "echo": echo}
        write_json(_record(run_dir, rank), record)
    except OSError:
        print(detail, flush=True)


def _silence_the_agent() -> None:
    """The agent's account of a failed rank is a page of log lines; the rank has written a better one."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _prepare_environment(count: int) -> None:
    """Threads divided among the ranks (torchrun would warn and take one), and our rooms first on the path."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    if sys.platform == "linux":
        # gloo would look up the machine's own host name, which need not resolve; all ranks are here.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # glibc hands a freed activation back to the system and faults it in again at the next step: keeping it
    # made a CPU step of the quickstart 8-10% shorter. Other C libraries ignore these names.
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(name, str(2**30))
    # `python -m` would look in the caller's folder first, and run whatever is called launch or evals there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    path = os.environ.get("PYTHONPATH", "")
    if str(CHECKOUT) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), path]))


def _cores() -> int:
    """Cores this process may use, which can be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def explain(error: Any, run_dir: Path) -> RankError:
    """The rank that failed by itself: the earliest to end, or the one that says why others agreed to fail.

    The others only lost their peer and say so in words that help nobody, or hung and were killed at the end.
    """
    logs = log_folder(run_dir)
    silent = {rank: not _record(run_dir, rank).is_file() for rank in error.failures}
    rank, first = min(
        error.failures.items(),
        key=lambda item: (item[1].timestamp, _effect(item[1].exitcode, silent=silent[item[0]])),
    )
    if not silent[rank]:
        return _recorded(logs)
    return RankError(
        f"rank {rank}: {_silent_end(first.exitcode)}; logs of the ranks are in {logs}",
        f"no traceback was recorded in {logs}",
    )


def _effect(status: int, *, silent: bool) -> int:
    """Which of two ends within a second (the agent's clock) is rather the effect of the other: the higher."""
    if status == -signal.SIGTERM:  # by torchrun's agent; it waits half a minute before it kills
        return 3
    if not silent:  # perhaps only in words that a peer is gone
        return 2
    return 0 if status < 0 else 1


def _recorded(logs: Path) -> RankError:
    """The first record, in the order of time, that is no echo."""
    paths = sorted(logs.glob("failure-rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    failures = [read_json(path) for path in paths]
    causes = [item for item in failures if not (item.get("echo") or is_echo(item["message"]))] or failures
    same = len({item["message"] for item in failures}) == 1
    where = "" if same else f"rank {causes[0]['rank']}: "
    return RankError(f"{where}{causes[0]['message']}", causes[0]["detail"])


def _silent_end(status: int) -> str:
    """What the status of a rank that recorded nothing means (negative: a signal)."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if status == WATCHDOG:
        return "exit status 1: a step outlived its timeout, or the rank could not start; see above or logs/"
    return f"exit status {status}"
