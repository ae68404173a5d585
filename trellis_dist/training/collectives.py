"""The two agreements of a step: numbers summed over all ranks, gradients summed over sequence ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["sum_scalars"]


def sum_scalars(values: Sequence[float], group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum each value over the ranks of ``group`` (default: all) in fp64, in one call on host memory.

    Exact for integers below 2^53. Without a process group the values come back as they are.
    """
    if not dist.is_initialized():
        return [float(value) for value in values]
    buffer = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(buffer, group=group)
    return [float(value) for value in buffer.tolist()]
