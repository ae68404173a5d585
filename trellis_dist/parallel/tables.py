"""Small tables on the device, copied there once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["table"]


@functools.lru_cache(maxsize=256)
def table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` [n] on ``device``, the same tensor each time: not to be written to.

    A copy from the host waits for what the device has been given to do, which with sp > 1 waits for a
    neighbour. Every layer asks for the same few tables of a batch, so only the first one waits.
    """
    with torch.inference_mode(False):  # or training could not use what an evaluation made
        return torch.tensor(values, dtype=dtype, device=device)
