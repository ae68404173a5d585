"""States that rows take over from rows of an earlier forward pass; no gradient goes back into that pass.

A document longer than a row is read as several rows. Where the earlier ones were computed before, each layer
goes on from the memories and the convolution inputs that they left (truncated backpropagation through time),
as ``prefill`` does, but with gradients inside the rows at hand. Only layers whose state has a fixed size can.

Shapes: B rows of T tokens, N documents (or parts of one) in them, K taps of the short convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import CompressState

__all__ = ["CarriedRows", "CarriedState", "Carry"]


@dataclass(frozen=True)
class CarriedState:
    """What one layer keeps of B rows, detached.

    Unlike a ``CompressState`` it does not say where in a chunk it stands: the data of the next rows do
    (``Carry.before``), also where a state was lost or read from a checkpoint.

    Attributes:
        key_memory, value_memory: after the rows' last tokens, [B, H, M, D] and [B, H, M, V].
        key_chunk_start, value_chunk_start: before the chunk that those tokens are in, of the same shapes.
        tail: [B, K-1, W], the last inputs of the convolution; None without convolution.
    """

    key_memory: Tensor
    value_memory: Tensor
    key_chunk_start: Tensor
    value_chunk_start: Tensor
    tail: Tensor | None


class Carry:
    """The states of all layers before and after one forward pass of B rows.

    No dataclass: FSDP casts the floating-point tensors that it finds in what a block is given, and memories
    stay fp32.

    Attributes:
        before: per row, the tokens of its first document that earlier rows have read; 0: it begins here.
        entering: one state per layer, of the rows before; None: they are lost, and the memories start as
            at the beginning of a document, in the middle of its chunk.
        leaving: layer -> its state after the rows, filled in by the forward pass.
    """

    def __init__(self, before: Sequence[int], entering: Sequence[CarriedState] | None = None) -> None:
        self.before = tuple(before)
        self.entering = entering
        self.leaving: dict[int, CarriedState] = {}

    def states(self) -> tuple[CarriedState, ...]:
        """``leaving`` in the order of the layers."""
        return tuple(state for _, state in sorted(self.leaving.items()))


@dataclass(frozen=True)
class CarriedRows:
    """Where the rows of a batch take over states and leave them; made once for all layers.

    Attributes:
        carry: the states.
        first, last: int64 [B], the documents at the ends of each row.
        inside: bool [B], whether the row begins inside a document.
        known: bool [B, K-1], which of the K-1 inputs before the row belong to its first document.
    """

    carry: Carry
    first: Tensor
    last: Tensor
    inside: Tensor
    known: Tensor

    @staticmethod
    def of(carry: Carry, starts: Tensor, *, length: int, conv_kernel: int) -> CarriedRows:
        """Of documents that begin at ``starts`` [N] in rows of ``length`` tokens, row starts included."""
        rows = len(carry.before)
        first = torch.searchsorted(starts, torch.arange(rows) * length)
        before = torch.tensor(carry.before)
        distance = torch.arange(max(conv_kernel - 1, 0), 0, -1)
        return CarriedRows(
            carry=carry,
            first=first,
            last=torch.cat([first[1:], first.new_tensor([len(starts)])]) - 1,
            inside=before > 0,
            known=distance <= before[:, None],
        )

    def to(self, device: torch.device) -> CarriedRows:
        """On ``device``; the states are there already."""
        tables = (self.first, self.last, self.inside, self.known)
        return CarriedRows(self.carry, *(table.to(device) for table in tables))

    def offsets(self, documents: int, chunk_size: int) -> list[int]:
        """Per document, how many tokens of its current chunk earlier rows have read."""
        offsets = [0] * documents
        for document, before in zip(self.first.tolist(), self.carry.before, strict=True):
            offsets[document] = before % chunk_size
        return offsets

    def memory(self, layer: int, initial: CompressState, offsets: tuple[int, ...]) -> CompressState:
        """The memories [N, ...] that the documents start from: carried, or as ``initial`` for a new one."""
        pair = initial.key_memory, initial.value_memory
        if self.carry.entering is None:
            return CompressState(*pair, *pair, offset=offsets)
        state = self.carry.entering[layer]
        return CompressState(
            key_memory=self._placed(initial.key_memory, state.key_memory),
            value_memory=self._placed(initial.value_memory, state.value_memory),
            key_chunk_start=self._placed(initial.key_memory, state.key_chunk_start),
            value_chunk_start=self._placed(initial.value_memory, state.value_chunk_start),
            offset=offsets,
        )

    def _placed(self, base: Tensor, rows: Tensor) -> Tensor:
        """``base`` [N, ...] with ``rows`` [B, ...] for the first documents of rows that begin inside one."""
        inside = self.inside.view(-1, 1, 1, 1)
        return base.index_copy(0, self.first, torch.where(inside, rows, base[self.first]))

    def tail(self, layer: int, inputs: Tensor) -> Tensor:
        """Convolution inputs [B, K-1, W] before the rows ``inputs`` [1, B T, W]; 0 before a document."""
        rows, reach = self.known.shape
        state = None if self.carry.entering is None else self.carry.entering[layer]
        if state is None or state.tail is None:
            return inputs.new_zeros(rows, reach, inputs.shape[-1])
        # Filled, not multiplied: not even a NaN crosses documents.
        return state.tail.to(inputs.dtype).masked_fill(~self.known.unsqueeze(-1), 0)

    def leave(self, layer: int, final: CompressState, tail: Tensor | None) -> None:
        """Keep what the rows' last documents leave of ``final`` [N, ...], and the inputs before the next."""
        assert final.key_chunk_start is not None, "the operation returns the chunk-start pair"
        assert final.value_chunk_start is not None, "the operation returns the chunk-start pair"
        self.carry.leaving[layer] = CarriedState(
            key_memory=final.key_memory.detach()[self.last],
            value_memory=final.value_memory.detach()[self.last],
            key_chunk_start=final.key_chunk_start.detach()[self.last],
            value_chunk_start=final.value_chunk_start.detach()[self.last],
            tail=None if tail is None else tail.detach(),
        )
