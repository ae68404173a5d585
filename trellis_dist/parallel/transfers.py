"""Point-to-point between sp neighbours: one communicator per direction, order fixed by program order.

No collective happens here: one per layer would put all sp ranks in lock-step, where a rank otherwise runs one
scan behind its left neighbour (parallelism.md). A message is one flat tensor, so the pair (S, R) travels as
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trellis_dist.parallel.mesh import Mesh

__all__ = ["Arrival", "Transfers"]

# Sends that may be under way before the oldest is waited for. A send completes when the neighbour, about one
# scan behind, posts its receive; a few layers of slack keep that from ever being a wait.
_MAX_PENDING = 8


class Arrival:
    """A receive that was posted; ``wait`` returns its tensors."""

    def __init__(self, work: dist.Work, buffer: Tensor, shapes: Sequence[torch.Size]) -> None:
        self._work = work
        self._buffer = buffer
        self._shapes = shapes

    def wait(self) -> list[Tensor]:
        """The tensors that were sent, in order (views of one buffer)."""
        self._work.wait()
        parts = self._buffer.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class Transfers:
    """What one rank exchanges with the segments before (left) and after (right) its own.

    Every sp rank must call the same methods in the same order; on the ends of the line the missing neighbour
    makes them no-ops. Rightward and leftward messages never share a communicator.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.rightward is not None, "transfers need a mesh with sp > 1"
        assert mesh.leftward is not None, "transfers need a mesh with sp > 1"
        self.mesh = mesh
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()

    def send_right(self, *tensors: Tensor) -> None:
        """Start sending to the next segment; returns at once."""
        self._send(tensors, self.mesh.right, self.mesh.rightward)

    def send_left(self, *tensors: Tensor) -> None:
        """Start sending to the previous segment; returns at once."""
        self._send(tensors, self.mesh.left, self.mesh.leftward)

    def expect_left(self, *like: Tensor) -> Arrival | None:
        """Post the receive of what the previous segment sends right, shaped ``like``; None on the first."""
        return self._receive(like, self.mesh.left, self.mesh.rightward)

    def expect_right(self, *like: Tensor) -> Arrival | None:
        """Post the receive of what the next segment sends left, shaped ``like``; None on the last."""
        return self._receive(like, self.mesh.right, self.mesh.leftward)

    def _send(self, tensors: Sequence[Tensor], to: int | None, group: dist.ProcessGroup | None) -> None:
        if to is None:
            return
        # Always a fresh buffer: nobody else writes to it, and the queue keeps it alive until it has arrived.
        buffer = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        work = dist.isend(buffer, dst=to, group=group)
        assert work is not None, "this rank is outside the group it sends in"
        self._pending.append((work, buffer))
        self._wait_for_all_but(_MAX_PENDING)

    def _receive(
        self, like: Sequence[Tensor], source: int | None, group: dist.ProcessGroup | None
    ) -> Arrival | None:
        if source is None:
            return None
        buffer = like[0].new_empty(sum(tensor.numel() for tensor in like))
        work = dist.irecv(buffer, src=source, group=group)
        assert work is not None, "this rank is outside the group it receives in"
        return Arrival(work, buffer, [tensor.shape for tensor in like])

    def _wait_for_all_but(self, kept: int) -> None:
        while len(self._pending) > kept:
            work, _ = self._pending[0]
            work.wait()
            self._pending.popleft()
