"""What a failed rank leaves in ``RUN/logs/``, and which of several failed ranks knows why.

When one rank fails the others fail too: they agree to, or lose the connection. Their records are marked as
echoes, so that the run has one cause, said once with rank, host and last operation.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trellis_dist.files import read_json, write_json
from trellis_dist.training.errors import CUT_OFF, SILENT_STORE, EchoError
from trellis_dist.training.watch.status_page import Status, read_status, status_path

__all__ = [
    "Failure",
    "RankError",
    "address_of",
    "cause_of",
    "claim_words",
    "doing",
    "forget_failure",
    "forget_failures",
    "is_echo",
    "is_restartable",
    "log_folder",
    "lost_addresses",
    "lost_contact",
    "read_failures",
    "record_failure",
    "report",
    "same_everywhere",
    "silent_end",
    "where",
]

# With which the watchdog of a rank ends it; any other failure with this status leaves a record.
WATCHDOG = 1
# Of argparse: the rank was started with arguments it does not know.
MISUSE = 2
# What gloo, NCCL and torch's store say when another process is gone; each is a plain RuntimeError.
LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
# A restart finds the same file missing, the same path in the way or the same package not installed.
REPEATED = (
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ImportError,
)
# The watch and the main thread of a process may fail together.
_RECORDING = threading.Lock()


class RankError(RuntimeError):
    """A rank failed; ``detail`` is its traceback, or a pointer to its log.

    ``restartable`` tells whether the same ranks, started again, may get further.
    """

    def __init__(self, message: str, detail: str, *, restartable: bool = False) -> None:
        super().__init__(message)
        self.detail = detail
        self.restartable = restartable


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The record of a failed rank.

    Attributes:
        rank, host: who failed.
        message, detail: one line, and the traceback.
        echo: another rank knows the cause.
        named: the message itself says which rank it is about, and where that was.
        restartable: the same ranks, started again, may get further.
        step, operation: what the rank did last; None and "" before it said so.
        at: unix seconds at which it failed.
        run_id, restart: of torchrun: which job, and the how-manieth start of its ranks (0: the first).
    """

    rank: int
    message: str
    detail: str
    host: str = field(default_factory=socket.gethostname)
    echo: bool = False
    named: bool = False
    restartable: bool = True
    step: int | None = None
    operation: str = ""
    at: float = field(default_factory=time.time)
    run_id: str = field(default_factory=lambda: os.environ.get("TORCHELASTIC_RUN_ID", ""))
    restart: int = field(default_factory=lambda: int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def log_folder(run_dir: Path) -> Path:
    """Where the output of ranks other than 0, and the failure of any rank, is written."""
    return run_dir / "logs"


def is_restartable(error: BaseException) -> bool:
    """Tell whether a restart may cure ``error``: the one place that decides it.

    A ValueError is about what the run was given (recipe, data, a checkpoint of another run) or about numbers
    that come out the same again (divergence). A full disk or a lost peer may be put right by then, and a bug
    may be a rare one.
    """
    if isinstance(error, EchoError):
        return True  # the rank that knows the cause decides
    return not isinstance(error, (ValueError, *REPEATED))


def lost_contact(error: BaseException | None) -> bool:
    """True for the error of a rank whose peer is gone: in its own words, or in those it was raised from."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
            return True
        error = error.__cause__
    return False


def is_echo(message: str) -> bool:
    """True for what a rank says when it only agreed to fail with another one, which knows the cause."""
    return "another rank" in message


def record_failure(
    run_dir: Path,
    *,
    rank: int,
    message: str,
    detail: str,
    echo: bool = False,
    named: bool = False,
    restartable: bool = True,
) -> Failure:
    """Leave a rank's error where the launcher finds it; a full disk must not hide the error itself.

    A process has one record. What its watch found about a hang is not replaced by what its main thread says
    when the others, who know of it, have left: that record stays, and is returned.

    ``echo``, ``named`` and ``restartable`` are those of ``Failure``; the last operation is taken from this
    rank's status page.
    """
    page = _page(run_dir, rank, pid=os.getpid())
    failure = Failure(
        rank=rank,
        message=message,
        detail=detail,
        echo=echo or is_echo(message),
        named=named,
        restartable=restartable,
        step=page.step if page else None,
        operation=page.operation if page else "",
    )
    with _RECORDING:
        held = next((found for found in read_failures(run_dir) if found.rank == rank), None)
        if failure.echo and held is not None and not held.echo and _one_start(held, failure):
            return held
        try:
            log_folder(run_dir).mkdir(parents=True, exist_ok=True)
            write_json(_record(run_dir, rank), asdict(failure))
        except OSError:
            print(detail, flush=True)
    return failure


def _one_start(first: Failure, second: Failure) -> bool:
    return (first.run_id, first.restart) == (second.run_id, second.restart)


def read_failures(run_dir: Path) -> list[Failure]:
    """The records in ``run_dir``, the earliest first; what is no record is left out.

    In a rank also those of ranks that this job does not have: they are an earlier, larger job's.
    """
    found, ranks = [], float(os.environ.get("WORLD_SIZE", "inf"))
    for path in log_folder(run_dir).glob("failure-rank-*.json"):
        try:
            found.append(Failure(**read_json(path)))
        except (OSError, ValueError, TypeError):  # removed or replaced just now, or another version's
            continue
    here = [failure for failure in found if failure.rank < ranks]
    return sorted(here, key=lambda failure: (failure.at, failure.rank))


def forget_failures(run_dir: Path) -> None:
    """Remove what ranks of an earlier start left."""
    for stale in log_folder(run_dir).glob("failure-rank-*"):
        stale.unlink(missing_ok=True)


def forget_failure(run_dir: Path, rank: int) -> None:
    """Remove what this rank left in an earlier start, its status page included."""
    page = status_path(log_folder(run_dir), rank)
    for stale in (_record(run_dir, rank), _claimed(run_dir, rank), page):
        stale.unlink(missing_ok=True)


def claim_words(run_dir: Path, failure: Failure) -> bool:
    """True for the first process of all that asks: it may say that ``failure`` will not be repeated."""
    try:
        _claimed(run_dir, failure.rank).touch(exist_ok=False)
    except OSError:
        return False
    return True


def cause_of(failures: Sequence[Failure]) -> Failure:
    """The earliest of ``failures`` that is no echo; of echoes alone, and of equal words, the first rank.

    What a rank found that is itself cut off, or does not reach the others, counts after what others say.
    """
    candidates = [failure for failure in failures if not failure.echo] or list(failures)
    candidates = [failure for failure in candidates if not _one_sided(failure)] or candidates
    words = candidates[0].message if not candidates[0].echo else None
    same = [failure for failure in candidates if words in (None, failure.message)]
    return min(same, key=lambda failure: failure.rank)


def _one_sided(failure: Failure) -> bool:
    return any(f": {words} " in failure.message for words in (CUT_OFF, SILENT_STORE))


def same_everywhere(failures: Sequence[Failure], *, ranks: int) -> bool:
    """True when all ``ranks`` say the same, so that none is to be named."""
    return len(failures) == ranks and len({failure.message for failure in failures}) == 1


def report(failure: Failure) -> str:
    """One line: rank, host, last operation, error."""
    if failure.named:
        return failure.message
    return f"rank {failure.rank} on {failure.host}{doing(failure.step, failure.operation)}: {failure.message}"


def doing(step: int | None, operation: str) -> str:
    """`` in step 12, backward pass``; empty for a rank that never said."""
    return "" if step is None else f" in step {step}, {operation}"


def where(run_dir: Path, rank: int, *, pid: int | None = None) -> tuple[str, str]:
    """`` on HOST`` and `` in step 12, backward pass`` of a rank that left no record, from its status page.

    The page of another process than ``pid``, if that is known, is one of an earlier start.
    """
    page = _page(run_dir, rank, pid=pid)
    return (f" on {page.host}", doing(page.step, page.operation)) if page else ("", "")


def lost_addresses(messages: Iterable[str]) -> set[str]:
    """Addresses of peers whose connection was lost, as gloo's words have them: ``[10.0.0.4]:26762``."""
    return {address for message in messages for address in re.findall(r"\[([0-9a-fA-F.:]+)\]:\d+", message)}


def address_of(run_dir: Path, rank: int) -> str | None:
    """The address of the host that this rank's status page names; None where it is not known."""
    page = _page(run_dir, rank, pid=None)
    try:
        return socket.gethostbyname(page.host) if page else None
    except OSError:
        return None


def silent_end(status: int) -> str:
    """What the status of a rank that recorded nothing means (negative: a signal)."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    if status == WATCHDOG:
        return "exit status 1: a step outlived its timeout, or the rank could not start; see above or logs/"
    return f"exit status {status}"


def _record(run_dir: Path, rank: int) -> Path:
    return log_folder(run_dir) / f"failure-rank-{rank:05d}.json"


def _claimed(run_dir: Path, rank: int) -> Path:
    return _record(run_dir, rank).with_suffix(".said")


def _page(run_dir: Path, rank: int, *, pid: int | None) -> Status | None:
    page = read_status(status_path(log_folder(run_dir), rank))
    return page if page is not None and pid in (None, page.pid) else None
