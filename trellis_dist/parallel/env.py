"""Process groups: start, stop, and the few collectives a run needs outside a step.

Under torchrun (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment) a process
group is made; a plain ``python`` process has none, and every helper here then answers for one rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

__all__ = [
    "agree",
    "alone",
    "broadcast_object",
    "cuda_index",
    "device",
    "forget",
    "init_distributed",
    "is_main",
    "local_rank",
    "once",
    "rank",
    "shutdown",
    "sum_scalar",
    "timeout_s",
    "world_size",
]

# torch gives every later group its own default (30 minutes), whatever the first was told: it is kept here.
_DEFAULT_TIMEOUT_S = 600.0
CONNECT_S = 300.0  # for the ranks of all nodes to come; imports from a cold network disk take minutes
FLIGHT_RECORDER = "64"  # collectives; reading so many takes about 2 ms
_timeout_s = _DEFAULT_TIMEOUT_S
# Process groups, and what holds them, made since init_distributed.
_kept: dict[Hashable, object] = {}

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(device: str | torch.device = "cpu", timeout_s: float = _DEFAULT_TIMEOUT_S) -> None:
    """Make the default process group of a torchrun environment; do nothing in a single process.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL for CUDA tensors and gloo for CPU tensors; also selects this
            rank's GPU).
        timeout_s: seconds after which a collective with a missing rank fails. The ranks are waited for no
            longer than ``CONNECT_S``.

    Raises:
        ValueError: the environment names some of torchrun's variables but not all, or no GPU for this rank.
        RuntimeError: the ranks did not come together, in torch's words.
    """
    global _timeout_s
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(cuda_index())
    if dist.is_initialized() or not _under_torchrun():
        return
    _timeout_s = timeout_s
    # No device_id here: bound to a device, NCCL would send every point-to-point transfer of a group through
    # one communicator, and a send to the right would hold back the receive from the left that was posted
    # after it.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    # torch's flight recorder then remembers the last collectives, so that a hang can be told by name.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER)
    # Connecting has a limit of its own: a collective may take long, an address that is wrong stays wrong.
    store, place, size = next(rendezvous("env://", timeout=timedelta(seconds=min(CONNECT_S, timeout_s))))
    limit = timedelta(seconds=timeout_s)
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=place, world_size=size, timeout=limit)


def timeout_s() -> float:
    """Seconds after which a collective fails, for process groups made after ``init_distributed``."""
    return _timeout_s


def _under_torchrun() -> bool:
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if "RANK" in missing:
        # WORLD_SIZE alone is left behind by some schedulers; without a rank there is nothing to join.
        return False
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start the job with torchrun or set all four"
        )
    return True


def shutdown() -> None:
    """Leave every process group (safe to call twice, and without a group)."""
    if not dist.is_initialized():
        return
    import sys

    # megatron-core keeps the groups in module globals; a later build_mesh must not find the dead ones.
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None:
        state.destroy_model_parallel()
    _kept.clear()
    dist.destroy_process_group()


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make()`` returned when ``key`` was first asked for, until ``forget`` or ``shutdown``.

    For what makes process groups: a group costs threads (gloo) or device memory (NCCL) for as long as the
    process lives. Where ``make`` is collective, every rank must ask for the same keys in the same order.
    """
    if key not in _kept:
        _kept[key] = make()
    return cast(T, _kept[key])


def forget() -> None:
    """Drop what ``once`` keeps: after an error, groups may be out of step, and the next use makes new ones.

    Every rank must do it at the same place. The groups are not destroyed, since that can wait for a peer:
    they end with the process.
    """
    _kept.clear()


def alone() -> dist.ProcessGroup:
    """A group of this rank alone, for a library that asks for one along an axis of one rank.

    Every rank must take part in the first call.
    """
    return once("alone", _new_group_of_one)


def _new_group_of_one() -> dist.ProcessGroup:
    group, _ = dist.new_subgroups(group_size=1)
    assert isinstance(group, dist.ProcessGroup), "every rank is in the group it makes for itself"
    return group


def rank() -> int:
    """Global rank; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank on this machine; 0 in a single process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Where this rank computes: its GPU (see ``cuda_index``), or the CPU on a machine without one."""
    return torch.device("cuda", cuda_index()) if torch.cuda.is_available() else torch.device("cpu")


def cuda_index() -> int:
    """Index of this rank's GPU among those that it sees: the only one, else its ``LOCAL_RANK``.

    Raises:
        ValueError: several GPUs and no LOCAL_RANK to choose by, or fewer GPUs than LOCAL_RANK needs.
    """
    visible = torch.cuda.device_count()
    if visible == 1:  # a scheduler may show each rank its own GPU and still count ranks
        return 0
    if "LOCAL_RANK" not in os.environ and world_size() > 1:
        # Index 0 would put every rank of the machine on one GPU.
        raise ValueError(
            f"LOCAL_RANK is not set and rank {rank()} sees {visible} GPUs: start the job with torchrun, set "
            "LOCAL_RANK to the rank within its machine (in Slurm SLURM_LOCALID), or show each rank one GPU"
        )
    if local_rank() >= visible:
        raise ValueError(
            f"LOCAL_RANK {local_rank()}: rank {rank()} sees {visible} GPUs; start one rank for each GPU, or "
            "show every rank all GPUs of its machine (CUDA_VISIBLE_DEVICES)"
        )
    return local_rank()


def world_size() -> int:
    """Number of ranks; 1 in a single process. Before ``init_distributed`` it is what torchrun announced."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main() -> bool:
    """True on the rank that prints, draws progress bars and commits files."""
    return rank() == 0


def sum_scalar(value: float, group: dist.ProcessGroup | None = None) -> float:
    """Sum of a number over the ranks of ``group`` in fp64; the same result on every rank."""
    return _reduce(value, dist.ReduceOp.SUM, group)


def agree(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """True when ``flag`` is true on every rank; every rank gets the same answer."""
    return _reduce(float(flag), dist.ReduceOp.MIN, group) > 0.5


def _reduce(value: float, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> float:
    if not dist.is_initialized():
        return float(value)
    buffer = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(buffer, op=op, group=group)
    return float(buffer.item())


def broadcast_object(value: T, src: int = 0) -> T:
    """The ``value`` of global rank ``src``, on every rank (pickled; for small things such as a run id)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src, device=torch.device("cpu"))
    return box[0]
