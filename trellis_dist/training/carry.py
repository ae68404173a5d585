"""The layer states that rows hand to the rows after them, between the steps of a run.

A place of the global batch reads consecutive rows in consecutive steps (``data.carry_rows``). This rank keeps
the states of its places, by micro-batch, as detached tensors; a checkpoint holds them for all places, so that
a run comes back to the same bits, on another mesh as well: the place decides, not the rank.

    carry/<layer>/key_memory, value_memory, key_chunk_start, value_chunk_start   [G, H, M, .]
    carry/<layer>/query_tail, key_tail                                           [G, K-1, F]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trellis_dist.models.carry import CarriedState, Carry
from trellis_dist.parallel.mesh import Mesh

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader
    from data_pipeline.loader import Batch

__all__ = ["RowStates"]

_MEMORIES = ("key_memory", "value_memory", "key_chunk_start", "value_chunk_start")
_TAILS = ("query_tail", "key_tail")


class RowStates:
    """States of this rank's places in the global batch; none before the first step."""

    def __init__(self, *, global_rows: int, micro_batch: int, mesh: Mesh) -> None:
        """Of G = ``global_rows`` places, of which each replica has an equal run, cut into micro-batches."""
        self._rows, self._micro_batch, self._mesh = global_rows, micro_batch, mesh
        self._states: dict[int, tuple[CarriedState, ...]] = {}

    def enter(self, batch: Batch) -> Carry | None:
        """What the rows of ``batch`` take over; None where they are no rows of this order (validation)."""
        if batch.carried is None:
            return None
        return Carry(batch.carried.tolist(), self._states.get(batch.slot))

    def leave(self, batch: Batch, carry: Carry) -> None:
        """Keep what the forward pass over ``batch`` left."""
        self._states[batch.slot] = carry.states()

    def forget(self) -> None:
        """Drop all states: those of a step that was skipped may not be finite.

        The next rows start from new memories, in the middle of their documents.
        """
        self._states = {}

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield this rank's share of every state; every replica and tensor shard writes its own."""
        for slot, layers in sorted(self._states.items()):
            for layer, state in enumerate(layers):
                yield from self._slices(slot, layer, state)

    def _slices(self, slot: int, layer: int, state: CarriedState) -> Iterator[LogicalTensor]:
        from checkpoints.logical import LogicalTensor

        tp, tp_rank = self._mesh.tp, self._mesh.tp_rank
        for name in _MEMORIES:
            x: Tensor = getattr(state, name)
            heads = x.shape[1]
            shape = (self._rows, heads * tp, *x.shape[2:])
            yield LogicalTensor(f"carry/{layer}/{name}", shape, (slot, heads * tp_rank, 0, 0), x)
        if state.tail is not None:
            for name, x in zip(_TAILS, state.tail.chunk(2, dim=-1), strict=True):
                _, reach, width = x.shape
                offset = (slot, 0, width * tp_rank)
                yield LogicalTensor(f"carry/{layer}/{name}", (self._rows, reach, width * tp), offset, x)

    def load(self, reader: CheckpointReader) -> None:
        """Read the states of this rank's places; none where the checkpoint has none.

        Raises:
            ValueError: they are those of a global batch of another size.
        """
        self.forget()
        names = set(reader.names())
        layers = sum(name.startswith("carry/") and name.endswith("/key_memory") for name in names)
        if not layers:
            return
        saved = reader.shape("carry/0/key_memory")[0]
        if saved != self._rows:
            raise ValueError(
                f"the checkpoint carries the states of {saved} rows, a step has {self._rows}: use the "
                "training.global_batch_tokens it was saved with"
            )
        share = self._rows // self._mesh.dp
        first = share * self._mesh.dp_rank
        for slot in range(first, first + share, self._micro_batch):
            self._states[slot] = tuple(self._read(reader, names, slot, layer) for layer in range(layers))

    def _read(self, reader: CheckpointReader, names: set[str], slot: int, layer: int) -> CarriedState:
        prefix = f"carry/{layer}"
        parts = (self._part(reader, f"{prefix}/{name}", slot, dim=1) for name in _MEMORIES)
        tail = None
        if f"{prefix}/{_TAILS[0]}" in names:
            halves = [self._part(reader, f"{prefix}/{name}", slot, dim=2) for name in _TAILS]
            tail = torch.cat(halves, dim=-1)
        return CarriedState(**dict(zip(_MEMORIES, parts, strict=True)), tail=tail)

    def _part(self, reader: CheckpointReader, name: str, slot: int, *, dim: int) -> Tensor:
        """One micro-batch's rows, and of ``dim`` this tensor rank's share."""
        shape, offset = list(reader.shape(name)), [0] * len(reader.shape(name))
        shape[0], offset[0] = self._micro_batch, slot
        shape[dim] //= self._mesh.tp
        offset[dim] = shape[dim] * self._mesh.tp_rank
        return reader.read(name, offset=tuple(offset), shape=tuple(shape)).to(self._mesh.device)
