"""Ranks that stay for the trials of several rows: a start costs seconds, DeepSpeed's first use more."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.sequence_parallel.ranks import Ranks

__all__ = ["close_pools", "pool", "said", "to_log"]

_pools: dict[int, Pool] = {}
TIMEOUT_S = 300.0


class Pool(Ranks):
    """Ranks that are replaced after a failure, when they may no longer agree on where they are."""

    def run(self, function, *arguments, timeout_s: float = TIMEOUT_S):  # type: ignore[no-untyped-def]
        """As ``Ranks.run``; after an error these ranks are gone."""
        try:
            return super().run(function, *arguments, timeout_s=timeout_s)
        except BaseException:
            _pools.pop(len(self._pipes), None)
            self.__exit__(None, None, None)
            raise


def pool(count: int) -> Pool:
    """``count`` ranks of one process group, started when they are first needed."""
    if count not in _pools:
        _pools[count] = Pool(count)
    return _pools[count]


def close_pools() -> None:
    """End all ranks: idle ones still cost, since each gloo group of theirs has a thread that looks around."""
    while _pools:
        _pools.popitem()[1].__exit__(None, None, None)


def to_log(folder: Path) -> None:
    """On a rank: write what it says from now on to a file in ``folder``."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    path = folder / f"rank-{os.environ['RANK']}.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def said(folder: Path, rank: int) -> str:
    """What a rank said since ``to_log``."""
    return (folder / f"rank-{rank}.log").read_text(errors="replace")
