"""How a process becomes a rank of a gloo group on this machine, for benchmarks and tests that start ranks."""

from __future__ import annotations

import os

__all__ = ["join", "torchrun_variables"]


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set, where the parent holds the store at ``port`` of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def join(rank: int, world_size: int, port: int, *, timeout_s: float) -> None:
    """Make this process that rank, of one thread; returns when all are there."""
    os.environ.update(torchrun_variables(rank, world_size, port))
    import torch  # after the variables: it reads some of them once

    from trellis_dist.parallel import env

    torch.set_num_threads(1)
    env.init_distributed("cpu", timeout_s=timeout_s)
