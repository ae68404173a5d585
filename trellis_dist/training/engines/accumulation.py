"""The forward and backward passes of one step, in the order that every engine shares."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from data_pipeline.loader import Batch

__all__ = ["accumulate"]


def accumulate(
    batches: Sequence[Batch],
    *,
    forward: Callable[[Batch], Tensor],
    backward: Callable[[Tensor, bool], None],
    forwards_first: int,
) -> Tensor:
    """Run all passes of a step; returns the sum of the losses (fp64 scalar, no synchronisation).

    Up to ``forwards_first`` forward passes run before their backward passes, both in the order of the
    batches, so that transfers between sequence ranks stay ordered by (micro-batch, layer). ``backward`` is
    told whether its pass is the step's last.
    """
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(batches), forwards_first):
        losses = deque(forward(batch) for batch in batches[first : first + forwards_first])
        for index in range(first, first + len(losses)):
            loss = losses.popleft()  # its graph is freed with its backward pass
            total = total.to(loss.device) + loss.detach().double()
            backward(loss, index == len(batches) - 1)
    return total
