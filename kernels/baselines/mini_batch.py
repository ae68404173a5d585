"""What TTT-linear and Titans share: memories that learn by gradients taken at the start of a mini-batch.

A mini-batch is a chunk of the grid. Inside it the state is more than the memory, and a call that goes on
there (``layout.offsets``) finds its remaining tokens at the front of their first chunk.

The inner loss of both reads a key with a normalised residual (Sun et al., arXiv 2407.04620, section 2.7):

    z = M k        loss = ||k + LN(z) - v||^2 / 2        LN(z) = w o (z - mean z) / sqrt(var z + eps) + b

Shapes: P chunks of C slots, H heads, V values; rows of K, V, Z are a chunk's slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import PackedLayout

__all__ = ["MiniBatches", "ResidualLoss", "read_residual"]

EPSILON = 1e-6  # of both originals


@dataclass(frozen=True)
class MiniBatches:
    """Where the mini-batches of a call begin and end.

    Attributes:
        entered: chunks that go on with a mini-batch begun earlier: those of the first scan step, where any
            document has an offset; else 0.
        slots: slots of its mini-batch before each of these chunks [entered]; None when there are none.
        inside: which documents go on with a mini-batch, bool [N] in the caller's order; None when none does.
        cut: the first chunk of each scan step in which some document stops inside its mini-batch.
        complete: whether each chunk reaches the end of its mini-batch, bool [P]; None when all do.
    """

    entered: int
    slots: Tensor | None
    inside: Tensor | None
    cut: frozenset[int]
    complete: Tensor | None

    @staticmethod
    def of(layout: PackedLayout) -> MiniBatches:
        """Those of ``layout``."""
        device = layout.last_chunk.device
        slots, inside, complete, c = None, None, None, layout.chunk_size
        if any(layout.offsets):
            offsets = torch.tensor(layout.offsets, device=device)
            slots, inside = layout.rank_documents(offsets), offsets > 0
        if layout.ending_chunk is not None:
            complete = torch.ones(layout.num_chunks, dtype=torch.bool, device=device)
            complete[layout.ending_chunk] = False
        ends = [o + n for o, n in zip(layout.offsets, layout.lengths, strict=True)]
        cut = frozenset(layout.steps[end // c][0] for end in ends if end % c)
        return MiniBatches(0 if slots is None else layout.num_documents, slots, inside, cut, complete)

    def entering(self, begun: Tensor, *, fresh: Tensor) -> Tensor:
        """``begun`` [N, H, ...] of documents that go on with a mini-batch, ``fresh`` of the others."""
        if self.inside is None:
            return fresh
        return torch.where(self.inside.view(-1, *[1] * (begun.dim() - 1)), begun, fresh)

    def ends(self, chunks: slice) -> Tensor | None:
        """Which of one scan step's ``chunks`` reach the end of their mini-batch [n, 1, 1, 1]; None: all."""
        if chunks.start not in self.cut:
            return None
        assert self.complete is not None, "a step is cut where some chunk is"
        return self.complete[chunks, None, None, None]


class ResidualLoss:
    """The inner loss of all chunks.

    Args:
        k, v: keys and values [P, H, C, V].
        weight, bias: w, b of each head [H, 1, V].
    """

    def __init__(self, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> None:
        # d loss / d LN(z), times w, is w o w o h + w o (b + k - v) with h = (z - mean z) / sqrt(var z + eps).
        self._square, self._rest = weight * weight, weight * (bias + k - v)

    def gradient(self, z: Tensor, chunks: slice) -> Tensor:
        """d loss / dz [n, H, C, V] at z of ``chunks``, of each slot on its own."""
        width = [z.shape[-1]]
        normed, mean, rstd = torch.native_layer_norm(z, width, None, None, EPSILON)
        outer = torch.addcmul(self._rest[chunks], self._square, normed)
        # The backward of a layer norm is differentiable itself; single operations take half as long again.
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(outer, z, width, mean, rstd, None, None, [True, False, False])[0]  # type: ignore[no-any-return]


def read_residual(q: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """q + LN(z) [P, H, C, V]; weight, bias [H, 1, V]."""
    return q + torch.addcmul(bias, weight, F.layer_norm(z, [z.shape[-1]], eps=EPSILON))
