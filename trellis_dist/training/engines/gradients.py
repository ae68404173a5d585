"""Gradients that one rank holds as whole tensors or shards: completed, measured, clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis_dist.parallel.gradients import gradient_norm
from trellis_dist.parallel.mesh import Mesh

__all__ = ["clip_gradients", "complete_gradients"]


def complete_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return all gradients; an unused parameter gets zeros, so that every engine updates it alike."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    return gradients


def clip_gradients(
    gradients: Sequence[tuple[Tensor, Tensor]],
    *,
    clip_norm: float,
    mesh: Mesh,
    shards: dist.ProcessGroup | None = None,
) -> float:
    """Scale gradients of (parameter, gradient) pairs in place to a global L2 norm of ``clip_norm`` or less.

    Returns the norm before clipping, the same on every rank (``shards`` as in ``gradient_norm``). With
    ``clip_norm`` = 0 nothing is scaled, and a non-finite norm leaves the decision to skip to the caller.
    """
    norm = gradient_norm(gradients, mesh, shards=shards)
    if clip_norm > 0 and clip_norm < norm + 1e-6:
        torch._foreach_mul_([gradient for _, gradient in gradients], clip_norm / (norm + 1e-6))
    return norm
