"""Pads in front of rows, so that prompts of unequal length end together and leave one state each.

Shapes: B rows, T tokens, K taps of a convolution, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FrontPads"]


@dataclass(frozen=True)
class FrontPads:
    """How many tokens at the front of each row are none.

    Attributes:
        counts: of each row.
        index: the same on the device of the tokens, int64 [B].
    """

    counts: tuple[int, ...]
    index: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], tokens: Tensor) -> FrontPads:
        """Pads of ``tokens`` [B, T].

        Raises:
            ValueError: not one number in [0, T] for each row.
        """
        rows, length = tokens.shape
        if len(counts) != rows or not all(0 <= count <= length for count in counts):
            raise ValueError(f"pads = {list(counts)}: give each of the {rows} rows a number in [0, {length}]")
        return cls(tuple(counts), torch.tensor(counts, device=tokens.device))

    def close_up(self, tail: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What a convolution reads, as if the pads stood before its tail.

        Args:
            tail: [B, K-1, F], the inputs before each row.
            inputs: [B, T, F], the pads' first.

        Returns:
            Both again, with each row's tail moved to the inputs of its first token: its last K-1 inputs are
            the row's last ones, its tail's where it has fewer tokens.
        """
        stream = torch.cat([tail, inputs], dim=1)
        reach, place = tail.shape[1], torch.arange(stream.shape[1], device=tail.device)
        pads = self.index[:, None]
        source = torch.where(place < pads + reach, (place - pads).clamp(min=0), place)
        moved = stream.gather(1, source[..., None].expand_as(stream))
        return moved[:, :reach], moved[:, reach:]
