"""The short convolution over a sequence that is cut into segments: fetch the K-1 inputs before the segment.

Forward, each rank sends the last K-1 inputs of its segment right and receives its own tail from the left;
backward, the gradient of the tail travels back and is added to the inputs it came from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trellis_dist.models.conv import ConvFunction
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.tables import table
from trellis_dist.parallel.transfers import Transfers

__all__ = ["HaloConvolution"]


class HaloConvolution:
    """A mixer's convolution, replaced: the same function of the whole sequence, computed on one segment.

    Args:
        dense: the mixer's own convolution, which takes the inputs before the first token as ``tail``.
        transfers: the neighbours.
        segments: which rows of the current batch continue a document of the segment before.
    """

    def __init__(self, dense: ConvFunction, transfers: Transfers, segments: Segments) -> None:
        self._dense = dense
        self._transfers = transfers
        self._segments = segments

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        edges: tuple[Tensor, ...] | None = None,
        tail: Tensor | None = None,
    ) -> Tensor:
        """Convolve the segment x [B, L, F] with weight [F, K]; see ``models.conv.causal_conv``.

        ``edges`` says that x is one packed row; where its documents start is taken from the cut. ``tail``,
        inputs before the whole sequence, is what the first segment starts from.

        Raises:
            ValueError: the segment is shorter than the convolution's reach.
        """
        reach = weight.shape[1] - 1
        if reach < 1:
            return self._dense(x, weight, edges=edges, tail=tail)
        rows = self._segments.rows(len(x), packed=edges is not None)
        by_row = x.reshape(rows, -1, x.shape[-1])
        _check_reach(by_row.shape[1], reach)
        by_row, halo = _Halo.apply(by_row, reach, self._transfers)  # type: ignore[no-untyped-call]
        if self._segments.mesh.left is not None:
            halo = _without_other_documents(halo, self._segments.before(rows, at_most=reach))
        if edges is None:
            return self._dense(by_row, weight, tail=tail if self._segments.mesh.left is None else halo)
        edges = self._segments.edges(reach + 1, x.device)
        return self._dense(by_row.reshape(x.shape), weight, edges=edges, tail=halo)


def _without_other_documents(halo: Tensor, before: tuple[int, ...]) -> Tensor:
    """``halo`` [R, K-1, F] with 0 for what is not among the ``before`` tokens of the continued document."""
    reach = halo.shape[1]
    if min(before) >= reach:
        return halo
    foreign = tuple(distance > tokens for tokens in before for distance in range(reach, 0, -1))
    # Filled, not multiplied: not even a NaN crosses documents.
    return halo.masked_fill(table(foreign, torch.bool, halo.device).view(-1, reach, 1), 0)


def _check_reach(length: int, reach: int) -> None:
    if length < reach:
        raise ValueError(
            f"a segment of {length} tokens is shorter than the {reach} a convolution of {reach + 1} taps "
            "looks back: use longer rows or a smaller mesh.sp"
        )


class _Halo(torch.autograd.Function):
    """x [B, T, F] -> (x, the last ``reach`` inputs of the segment before [B, reach, F]; zeros on the first).

    x passes through so that its gradient meets this node: every rank then runs the backward, and with it the
    transfer, whatever the values of the gradients are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reach: int, transfers: Transfers) -> tuple[Tensor, Tensor]:
        ctx.reach, ctx.transfers = reach, transfers
        arrival = transfers.expect_left(x[:, :reach])
        transfers.send_right(x[:, -reach:])
        tail = torch.zeros_like(x[:, :reach]) if arrival is None else arrival.wait()[0]
        return x.view_as(x), tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dtail: Tensor) -> tuple[Tensor, None, None]:
        arrival = ctx.transfers.expect_right(dtail)
        ctx.transfers.send_left(dtail)
        if arrival is None:
            return dx, None, None
        dx = dx.clone()
        dx[:, -ctx.reach :] += arrival.wait()[0]
        return dx, None, None
