"""Answers for the ``torch.cuda`` names that megatron-core uses without asking whether there is a GPU.

megatron-core allocates the results of its collectives with ``device=torch.cuda.current_device()``, which
raises on a machine without CUDA. There, and only there, the question is answered with the CPU device.
"""

from __future__ import annotations

import torch

__all__ = ["install"]


def install() -> bool:
    """Answer megatron-core's questions with the CPU; False, and nothing changes, where CUDA exists."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
    return True


def _cpu_device() -> torch.device:
    return torch.device("cpu")
