"""What a rank is doing, in a small file that outlives it.

The page is memory that the file system keeps: a write costs microseconds and no system call, and what a rank
wrote last is still there after SIGKILL (not after the machine went down). Two slots take turns, each with a
checksum, so a process killed inside a write leaves the line before it, and a torn read is no line at all.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Status", "StatusPage", "read_status", "status_path"]

SLOT = 512  # bytes: 8 hexadecimal digits of CRC-32, then JSON, then spaces
SLOTS = 2
CHECK = 8
LONGEST_HOST, LONGEST_OPERATION = 64, 100  # characters; a slot holds them even if JSON escapes every one


@dataclass(frozen=True, kw_only=True)
class Status:
    """One line of a page: since ``since`` (unix seconds) process ``pid`` on ``host`` does ``operation``."""

    rank: int
    host: str
    pid: int
    step: int
    operation: str
    since: float


def status_path(folder: Path, rank: int) -> Path:
    """Where rank ``rank`` keeps its page below ``folder``."""
    return folder / f"rank-{rank:05d}.status"


class StatusPage:
    """A rank's own page, for one writing thread; where the file system refuses, it warns once and is off."""

    def __init__(self, path: Path, *, rank: int, clock: Callable[[], float] = time.time) -> None:
        """Make or empty the file ``path``; ``clock`` gives unix seconds."""
        self._rank, self._clock, self._turn = rank, clock, 0
        self._host, self._pid = _plain(socket.gethostname(), LONGEST_HOST), os.getpid()
        self._page: mmap.mmap | None = None
        try:
            self._page = _open(path)
        except (OSError, ValueError) as error:  # some file systems have no shared mappings
            print(f"no status page at {path} ({error}): the run goes on without it", file=sys.stderr)

    def write(self, *, step: int, operation: str) -> None:
        """Say that this rank begins ``operation`` of ``step`` now; does nothing after ``close``."""
        if self._page is None:
            return
        status = Status(
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            step=step,
            operation=_plain(operation, LONGEST_OPERATION),
            since=self._clock(),
        )
        self._turn += 1
        start = self._turn % SLOTS * SLOT
        self._page[start : start + SLOT] = _encode(status, self._turn)

    def close(self) -> None:
        """Let go of the file, which keeps the last line; may be called twice."""
        if self._page is not None:
            self._page.close()
            self._page = None


def _open(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Not truncated, which would kill an earlier process that still has it mapped; and written in full,
        # because a disk that is full shows itself here as an error and in a mapping as SIGBUS.
        if os.pwrite(descriptor, bytes(SLOT * SLOTS), 0) != SLOT * SLOTS:
            raise OSError("the page could not be written in full")
        return mmap.mmap(descriptor, SLOT * SLOTS)
    finally:
        os.close(descriptor)


def _plain(text: str, longest: int) -> str:
    """The first characters of ``text``, those that JSON would blow up to six bytes replaced."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:longest])


def _encode(status: Status, turn: int) -> bytes:
    text = json.dumps({**vars(status), "turn": turn}).encode()
    line = text.ljust(SLOT - CHECK)
    assert len(line) == SLOT - CHECK, "a line of bounded texts fits into a slot"
    return b"%08x" % zlib.crc32(line) + line


def read_status(path: Path) -> Status | None:
    """What the page at ``path`` says last; None when there is no page or nothing sound on it."""
    try:
        with open(path, "rb") as file:
            page = file.read(SLOT * SLOTS)
    except OSError:
        return None
    lines = [_decode(page[start : start + SLOT]) for start in range(0, SLOT * SLOTS, SLOT)]
    newest = max((line for line in lines if line is not None), key=lambda line: line[0], default=None)
    return None if newest is None else newest[1]


def _decode(slot: bytes) -> tuple[int, Status] | None:
    """The (turn, status) of a slot, or None where its checksum or its fields are not right."""
    line = slot[CHECK:]
    if slot[:CHECK] != b"%08x" % zlib.crc32(line):
        return None
    try:
        fields = json.loads(line)
        turn = int(fields.pop("turn"))
        status = Status(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    numbers = isinstance(status.rank, int) and isinstance(status.pid, int) and isinstance(status.step, int)
    texts = isinstance(status.host, str) and isinstance(status.operation, str)
    return (turn, status) if numbers and texts and isinstance(status.since, float | int) else None
