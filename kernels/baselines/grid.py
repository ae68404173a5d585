"""What the baseline recurrences share: tokens in chunk order, pads that write nothing, the scan over chunks.

Shapes: B rows, T tokens, H heads, N documents (B of them unless packed), P chunks of C slots, F a width.

    token order  [B, T, H, F]  --Grid.reads, Grid.writes-->  chunk order  [P, H, C, F]  --Grid.tokens-->  back

Every document has its own chunks (kernels.layout). The slots of a chunk that hold no token lie behind those
that do; they read a token of their own chunk, and are silenced where they would write: ``writes`` and
``scalars`` hold 0 on them, or what the caller names. So a document gives what it gives alone, whatever is
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from kernels.layout import PackedLayout

__all__ = ["Grid", "Memory", "Operation", "compute_dtype", "decay_matrix"]

Memory = tuple[Tensor, ...]

LOG2_E = 1.4426950408889634  # on a CPU, exp2 is several times faster than exp


class Operation(Protocol):
    """A recurrence over the tokens of documents, differentiable in every tensor."""

    def __call__(
        self,
        tokens: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        memory: Memory,
        layout: PackedLayout,
    ) -> tuple[Tensor, Memory]:
        """Outputs and the memories after each document.

        Args:
            tokens: by name, what every token has [B, T, H] or [B, T, H, F].
            weights: by name, what every head has [H, ...].
            memory: before each document [N, H, ...], in fp32 (fp64 for fp64 tokens).
            layout: the chunk grid of the documents.

        Returns:
            y [B, T, H, V] in the dtype of the values, and the memories [N, H, ...] after the last tokens.
        """
        ...


def compute_dtype(*xs: Tensor) -> torch.dtype:
    """fp64 where any of ``xs`` is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


class Grid:
    """The chunk order of one call.

    Attributes:
        layout: where each token sits.
        dtype: in which everything is computed.
    """

    def __init__(self, layout: PackedLayout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype

    def reads(self, x: Tensor) -> Tensor:
        """[B, T, H, F] -> [P, H, C, F]; a pad holds a token of its own chunk."""
        return self.layout.to_chunks(x.to(self.dtype))

    def writes(self, x: Tensor, *, pads: float = 0.0) -> Tensor:
        """[B, T, H, F] -> [P, H, C, F]; a pad holds ``pads``."""
        return self._filled(self.reads(x), pads)

    def scalars(self, x: Tensor, *, pads: float = 0.0) -> Tensor:
        """[B, T, H] -> [P, H, C]; a pad holds ``pads``."""
        return self._filled(self.reads(x.unsqueeze(-1)), pads).squeeze(-1)

    def tokens(self, y: Tensor, like: Tensor) -> Tensor:
        """[P, H, C, F] -> [B, T, H, F] in the dtype of ``like``, whose B rows it has."""
        return self.layout.from_chunks(y.contiguous(), len(like)).to(like.dtype)

    def scan(
        self, step: Callable[[Memory, slice], tuple[Memory, Memory]], memory: Memory
    ) -> tuple[Memory, Memory]:
        """Run ``step`` over the chunks of all documents, the n-th chunks of all together.

        Args:
            step: (memories [n, H, ...] of the documents that still run, their chunks) -> (the memories after
                these chunks, any tensors [n, ...] to keep of them).
            memory: before each document [N, H, ...].

        Returns:
            What was kept [P, ...], and the memories after each document [N, H, ...].
        """
        now = tuple(self.layout.rank_documents(x) for x in memory)
        kept: list[Memory] = []
        ended: list[Memory] = []
        for begin, end in self.layout.steps:
            running = end - begin
            if running < len(now[0]):
                ended.append(tuple(x[running:] for x in now))
                now = tuple(x[:running] for x in now)
            now, outputs = step(now, slice(begin, end))
            kept.append(outputs)
        ended.append(now)
        joined = tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
        final = (torch.cat(parts) for parts in zip(*reversed(ended), strict=True))
        return joined, tuple(self.layout.unrank_documents(x) for x in final)

    def _filled(self, x: Tensor, value: float) -> Tensor:
        if self.layout.valid is None:
            return x
        return x.masked_fill(~self.layout.valid[:, None, :, None], value)


def decay_matrix(cumulative: Tensor, *, strict: bool = False) -> Tensor:
    """Omega_ij = e^{l_i - l_j} for i >= j (``strict``: i > j), else 0: [..., C] -> [..., C, C].

    The exponent is masked before it is taken: e^{large} * 0 would be NaN.
    """
    c = cumulative.shape[-1]
    ahead = torch.ones(c, c, dtype=torch.bool, device=cumulative.device).triu(0 if strict else 1)
    exponent = cumulative[..., :, None] - cumulative[..., None, :]
    return (exponent * LOG2_E).masked_fill(ahead, -torch.inf).exp2()
