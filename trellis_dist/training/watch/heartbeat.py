"""A sign of life from every rank, kept in the job's store, so that the others know who fell silent and where.

Each rank writes its own beat about once a second from a thread with its own connection to the store; nobody
reads them while all is well. The rank that judges a hang reads them all and leaves its verdict in the store,
where the other ranks' next beats find it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from trellis_dist.training.watch.flight import Collective, Group, read_groups

__all__ = ["Beat", "Heartbeat", "default_store"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank said last.

    Attributes:
        count: grows with every beat.
        time, since: unix seconds of this rank's clock: of the beat, and of the start of ``operation``.
        ended: the rank closed its heartbeat: its run is over, or it raised.
        groups: the collectives it entered last (``flight.read_groups``).
    """

    rank: int
    host: str
    pid: int
    step: int
    operation: str
    since: float
    count: int
    time: float
    ended: bool = False
    groups: Mapping[str, Group] = field(default_factory=dict)

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: bytes | str) -> Beat:
        """Read what ``encode`` wrote; ``ValueError``, ``TypeError`` or ``KeyError`` on anything else."""
        fields: dict[str, Any] = json.loads(text)
        fields["groups"] = {key: _group(value) for key, value in fields["groups"].items()}
        return cls(**fields)


def _group(value: Mapping[str, Any]) -> Group:
    waiting = value["waiting"]
    return Group(value["label"], Collective(**value["last"]), Collective(**waiting) if waiting else None)


def default_store() -> Store | None:
    """The store of the default process group; None without one."""
    if not dist.is_initialized():
        return None
    store: Store = dist.distributed_c10d._get_default_store()
    return store


class Heartbeat:
    """This rank's beat, and the way to everybody else's. Every call that asks the store is bounded in time.

    A store that fails ends the beats quietly: at the end of a run its host may be the first to leave.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        interval_s: float = 1.0,
        prefix: str = "watch",
        groups: Callable[[], Mapping[str, Group]] = read_groups,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Connect anew to ``store`` (the main thread may wait in the old connection) and start to beat."""
        self.interval_s = interval_s
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._rank, self._world_size = rank, world_size
        self._groups, self._clock = groups, clock
        self._host, self._pid, self._count = socket.gethostname(), os.getpid(), 0
        self._doing = (0, "start", clock())
        self._verdict: str | None = None
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="trellis-heartbeat", daemon=True)
        self._thread.start()

    @property
    def verdict(self) -> str | None:
        """What a rank found out about a hang, once this rank's thread has seen it."""
        return self._verdict

    def note(self, step: int, operation: str) -> None:
        """Say what this rank does from now on; the next beat carries it."""
        self._doing = (step, operation, self._clock())

    def close(self) -> None:
        """Say that this rank is through, and stop; may be called twice."""
        self._stop.set()
        self._thread.join(self.interval_s)

    def read(self, limit_s: float) -> dict[int, Beat | None] | None:
        """Everybody's last beat (None: never heard of); None when the store does not answer in time."""
        return bounded(self._read, limit_s)

    def claim(self, limit_s: float) -> bool | None:
        """Whether this rank is the first to judge the hang; None when the store does not answer in time."""
        mine = str(self._rank)
        return bounded(lambda: self._store.compare_set("judge", "", mine).decode() == mine, limit_s)

    def look(self, limit_s: float) -> str | None:
        """The verdict of another rank, if there is one; asked for now, not with the next beat."""
        return bounded(self._look, limit_s)

    def publish(self, verdict: str, limit_s: float) -> None:
        """Leave ``verdict`` for the other ranks."""
        bounded(lambda: self._store.set("verdict", verdict), limit_s)

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(self.interval_s)
            try:
                self._beat(ended=stopping)
                self._verdict = self._verdict or self._look()
            except RuntimeError:  # what torch raises for a lost connection
                return
            if stopping:
                return

    def _look(self) -> str | None:
        found = self._store.check(["verdict"])
        return self._store.get("verdict").decode(errors="replace") if found else None

    def _beat(self, *, ended: bool = False) -> None:
        step, operation, since = self._doing
        self._count += 1
        beat = Beat(
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            step=step,
            operation=operation,
            since=since,
            count=self._count,
            time=self._clock(),
            ended=ended,
            groups=self._groups(),
        )
        self._store.set(f"beat/{self._rank}", beat.encode())

    def _read(self) -> dict[int, Beat | None]:
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        if self._store.check(keys):
            return {rank: _decode(text) for rank, text in enumerate(self._store.multi_get(keys))}
        found = [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        return {rank: _decode(text) for rank, text in enumerate(found)}


def _decode(text: bytes) -> Beat | None:
    try:
        return Beat.decode(text)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def bounded(work: Callable[[], T], limit_s: float) -> T | None:
    """What ``work()`` returns, or None when it raised or took longer; it is then left to its own thread."""
    result: list[T] = []

    def run() -> None:
        try:
            result.append(work())
        except RuntimeError:
            return

    thread = threading.Thread(target=run, name="trellis-store", daemon=True)
    thread.start()
    thread.join(limit_s)
    return result[0] if result else None
