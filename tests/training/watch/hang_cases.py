"""Ranks for the tests of hangs: processes of their own, since they end (or are stopped) for good."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing.context
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from tests.distributed import fork_server
from trellis_dist.training.watch.status_page import status_path

TIMEOUT_S = 2.0
BEAT_S = 1.0
VICTIM_STEP = 4
Process = multiprocessing.context.ForkServerProcess


def rank_main(rank: int, world_size: int, port: int, folder: Path, case: str) -> None:
    """Step after step of one all-reduce; ``case`` says what happens to its victim."""
    _to_log(folder, rank)
    os.environ["TORCH_FR_BUFFER_SIZE"] = "64"
    import torch
    import torch.distributed as dist

    from trellis_dist.training.watch.hang import HangWatch
    from trellis_dist.training.watch.heartbeat import Heartbeat, default_store
    from trellis_dist.training.watch.status_page import StatusPage

    torch.set_num_threads(1)
    store = _store(rank, port, folder)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    watch = HangWatch(
        rank=rank,
        report=lambda message, echo: _record(folder, rank, message, echo),
        heartbeat=Heartbeat(default_store(), rank=rank, world_size=world_size, interval_s=BEAT_S),
        page=StatusPage(status_path(folder, rank), rank=rank),
        store_rank=None if port else 0,
        logs=folder,
        poll_s=0.1,
    )
    last = VICTIM_STEP if case == "finish" else sys.maxsize
    for step in range(1, last + 1):
        # Short only where it must pass: machines that run tests may stall for seconds.
        limit = TIMEOUT_S if step == VICTIM_STEP and case != "finish" else 150.0
        watch.arm(limit, step=step, operation="gradient reduction")
        if case == f"stop {rank}" and step == VICTIM_STEP:
            os.kill(os.getpid(), signal.SIGSTOP)
        if case == f"skip {rank}" and step == VICTIM_STEP:
            watch.disarm()
            watch.enter("a detour")
            time.sleep(250)
        dist.all_reduce(torch.ones(5))
    watch.close()


def alone_main(folder: Path, holds_the_lock: bool) -> None:
    """A plain process that hangs, with Python running beside it or not."""
    _to_log(folder, 0)
    from trellis_dist.training.watch import hang

    hang.GRACE_S = 1.0
    watch = hang.HangWatch(rank=0, report=lambda message, echo: _record(folder, 0, message, echo), poll_s=0.1)
    watch.arm(0.5, step=3, operation="forward pass")
    library = ctypes.PyDLL(None) if holds_the_lock else ctypes.CDLL(None)
    library.sleep(250)


def _to_log(folder: Path, rank: int) -> None:
    stream = open(folder / f"log-{rank}", "w")  # noqa: SIM115 - lives as long as the process
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)


def _record(folder: Path, rank: int, message: str, echo: bool) -> None:
    part = folder / f"part-{rank}"
    part.write_text(json.dumps([message, echo]))
    part.rename(folder / f"report-{rank}")


def _store(rank: int, port: int, folder: Path):
    import torch.distributed as dist

    limit = timedelta(seconds=30)
    if port:
        return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        (folder / "port.new").write_text(str(store.port))
        (folder / "port.new").rename(folder / "port")
        return store
    until(lambda: (folder / "port").exists())
    return dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), is_master=False, timeout=limit)


def until(condition, limit_s: float = 200.0) -> float:
    """Seconds until ``condition()`` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, "it never came to it"
        time.sleep(0.02)
    return time.monotonic() - start


@contextlib.contextmanager
def ranks(world_size: int, folder: Path, case: str, *, own_store: bool = False) -> Iterator[list[Process]]:
    """Start ``rank_main``s; with ``own_store`` rank 0 keeps the store, else this process."""
    import torch.distributed as dist

    store = None
    if not own_store:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port if store else 0
    with started(
        [(rank_main, (rank, world_size, port, folder, case)) for rank in range(world_size)]
    ) as processes:
        yield processes


@contextlib.contextmanager
def started(orders: list[tuple]) -> Iterator[list[Process]]:
    context = fork_server()
    processes = [context.Process(target=target, args=args, daemon=True) for target, args in orders]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join(10)


def reports(folder: Path, world_size: int) -> dict[int, tuple[str, bool]]:
    paths = {rank: folder / f"report-{rank}" for rank in range(world_size)}
    return {rank: tuple(json.loads(path.read_text())) for rank, path in paths.items() if path.exists()}


def log(folder: Path, rank: int) -> str:
    return (folder / f"log-{rank}").read_text()


def the_message(found: dict[int, tuple[str, bool]]) -> str:
    """What all say; exactly one says it first."""
    messages = {message for message, _ in found.values()}
    assert len(messages) == 1, found
    assert list(itertools.chain(echo for _, echo in found.values())).count(False) == 1, found
    return messages.pop()
