"""Whole gradients on one rank: completed, measured, clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["clip_gradients", "complete_gradients"]


def complete_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return all gradients; an unused parameter gets zeros, so that every engine updates it alike."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def clip_gradients(gradients: Sequence[Tensor], clip_norm: float) -> float:
    """Scale ``gradients`` in place to a global L2 norm of at most ``clip_norm`` (0: never).

    Returns the norm before clipping; a non-finite norm leaves the decision to skip to the caller.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm > 0:
        scale = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(list(gradients), scale)
    return float(norm)
