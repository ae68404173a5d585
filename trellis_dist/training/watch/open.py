"""The watch of a run in training: a page in its folder, a beat in the job's store, a deadline per phase."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from trellis_dist.parallel import env
from trellis_dist.training.watch.hang import HangWatch
from trellis_dist.training.watch.heartbeat import Heartbeat, default_store
from trellis_dist.training.watch.status_page import StatusPage, status_path

__all__ = ["Report", "open_watch"]

# Takes (message, echo) of a rank that is about to end because of a hang.
Report = Callable[[str, bool], None]


def open_watch(run_dir: Path, *, token: str, report: Report | None = None) -> HangWatch:
    """Start to watch this rank; every rank calls it.

    Args:
        run_dir: the page is in its ``logs/``.
        token: the same on all ranks and new for every start, since a store may outlive one.
        report: told why the process ends; standard error unless given.
    """
    rank, logs = env.rank(), run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    store = default_store() if env.world_size() > 1 else None
    heartbeat = None
    if store is not None:
        heartbeat = Heartbeat(store, rank=rank, world_size=env.world_size(), prefix=f"watch-{token}")
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return HangWatch(
        rank=rank,
        report=report or _say,
        heartbeat=heartbeat,
        page=StatusPage(status_path(logs, rank), rank=rank),
        logs=logs,
        store_rank=None if agent_has_store else 0,
        # The agent's node may be what is gone, and its ranks with it: one rank of each node then says so.
        speaks=env.local_rank() == 0 if agent_has_store else None,
    )


def _say(message: str, echo: bool) -> None:
    if not echo:
        print(f"error: {message}", file=sys.stderr, flush=True)
