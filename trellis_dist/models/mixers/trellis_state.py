"""What a Trellis layer carries from one call to the next (docs/math.md, carried state)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import CompressState

__all__ = ["TrellisState"]


@dataclass(frozen=True)
class TrellisState:
    """What a layer carries between calls; its size does not depend on the position.

    Attributes:
        memory: both memories, [B, H, M, D] and [B, H, M, V].
        tail: [B, K-1, W], the last inputs of the convolution, W = 2F (+ F with ``conv_values``, + H M with
            ``conv_targets``); None without one.
    """

    memory: CompressState
    tail: Tensor | None

    def select_rows(self, rows: Sequence[int]) -> TrellisState:
        """The state whose row r continues row ``rows[r]`` of this one."""
        tail = self.tail
        if tail is not None:
            tail = tail.index_select(0, torch.tensor(list(rows), dtype=torch.long, device=tail.device))
        return TrellisState(self.memory.select_rows(rows), tail)

    def bytes(self) -> int:
        """Bytes of the state; the chunk-start pair counts even while it is the same as the memories."""
        pair = (self.memory.key_memory, self.memory.value_memory)
        tensors = [*pair, *pair] if self.tail is None else [*pair, *pair, self.tail]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
