"""How fast the nodes reach each other: one process of each in a group, by the backend that training uses.

All-reduce over all of them, then each link of the ring of nodes by itself, so that a slow node can be told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from launch.nodes.limit import within

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["REDUCE_S", "keep_store", "measure"]

REDUCE_S = 90.0  # for all of it; NCCL's first contact takes seconds
REPEATS = 5  # of which the best counts: another job may use the network now and then
CPU_BYTES, CUDA_BYTES = 8 << 20, 256 << 20


def keep_store() -> TCPStore:
    """The store in which the group finds itself, on a free port of this node, while the result is kept."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=REDUCE_S))


def measure(rank: int, count: int, *, host: str, port: int, cuda: bool) -> dict[str, Any]:
    """Join the group of ``count`` nodes as its ``rank`` and measure, for ``REDUCE_S`` at most.

    Args:
        host, port: of the store.
        cuda: with NCCL, on this node's first GPU; otherwise with gloo, in host memory.

    Returns:
        ``{"all_reduce": GB/s, "links": [[node, node, GB/s], ...]}``; the links of which this node is the left
        end. The GB/s of an all-reduce are what each node sends and receives, 2 (n - 1) / n of the bytes.

    Raises:
        RuntimeError, OSError, TimeoutError: in the words of torch, or the time was up.
    """
    return within(lambda: _measure(rank, count, host=host, port=port, cuda=cuda), REDUCE_S)


def _measure(rank: int, count: int, *, host: str, port: int, cuda: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=REDUCE_S)
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    if cuda:
        torch.cuda.set_device(0)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    data = torch.ones((CUDA_BYTES if cuda else CPU_BYTES) // 4, device="cuda:0" if cuda else "cpu")
    try:
        speed = _all_reduce(data, count)
        links = [_link(data, rank, left, (left + 1) % count) for left in range(count if count > 2 else 1)]
    finally:
        if not cuda:  # NCCL would wait for a peer that has failed; the process ends soon
            dist.destroy_process_group()
    return {"all_reduce": speed, "links": [link for link in links if link is not None]}


def _all_reduce(data: Tensor, count: int) -> float:
    import torch.distributed as dist

    total = data[:1].clone()
    dist.all_reduce(total)
    if total.item() != count:
        raise RuntimeError(f"{count} nodes that each give 1 sum up to {total.item():g}")
    seconds = min(_timed(lambda: dist.all_reduce(data.fill_(1.0)), data) for _ in range(REPEATS))
    return 2 * (count - 1) / count * data.numel() * data.element_size() / seconds / 1e9


def _link(data: Tensor, rank: int, left: int, right: int) -> list[float] | None:
    """Send from ``left`` to ``right`` while the others wait; [left, right, GB/s] on the left one."""
    import torch.distributed as dist

    best = float("inf")
    for _ in range(REPEATS):
        if rank == left:
            best = min(best, _timed(lambda: _there_and_back(data, right), data))
        elif rank == right:
            dist.recv(data, left)
            dist.send(data[:1], left)
        dist.barrier()
    return [left, right, data.numel() * data.element_size() / best / 1e9] if rank == left else None


def _there_and_back(data: Tensor, right: int) -> None:
    import torch.distributed as dist

    dist.send(data, right)
    dist.recv(data[:1], right)


def _timed(work: Callable[[], object], data: Tensor) -> float:
    import torch

    begin = time.perf_counter()
    work()
    if data.is_cuda:
        torch.cuda.synchronize(data.device)
    return time.perf_counter() - begin
