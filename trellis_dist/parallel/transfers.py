"""Point-to-point between sp neighbours: one communicator per direction, order fixed by program order.

No collective happens here: one per layer would put all sp ranks in lock-step, where a rank otherwise runs one
scan behind its left neighbour (parallelism.md). A message is one flat tensor, so the pair (S, R) travels as
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.tape import Tape

__all__ = ["Arrival", "Transfers", "sends_under_way", "settle_sends"]

# Sends that may be under way before the oldest is waited for. A send completes when the neighbour, about one
# scan behind, posts its receive; a few layers of slack keep that from ever being a wait.
_MAX_PENDING = 8

# Sends under way, by communicator: a message must outlive also the Transfers that sent it, whose model may be
# dropped right after a step that the neighbour has not finished.
_pending: WeakKeyDictionary[dist.ProcessGroup, deque[tuple[dist.Work, Tensor]]] = WeakKeyDictionary()


def settle_sends() -> None:
    """Wait until every message of this rank has arrived; at the end of a step the neighbours take them all.

    For who watches collectives, and ends: torch's profiler is told of a send's end when somebody waits for
    it, and after the profiler has stopped that damages the heap (torch 2.13).
    """
    for pending in _pending.values():
        while pending:
            pending.popleft()[0].wait()


def sends_under_way() -> bool:
    """Whether this rank has sent what nobody has waited for, arrived or not."""
    return any(_pending.values())


class Arrival:
    """A receive that was posted; ``wait`` returns its tensors, also when asked again."""

    def __init__(self, work: dist.Work, buffer: Tensor, shapes: Sequence[torch.Size]) -> None:
        self._work: dist.Work | None = work
        self._buffer = buffer
        self._shapes = shapes

    def wait(self) -> list[Tensor]:
        """The tensors that were sent, in order (views of one buffer)."""
        if self._work is not None:
            self._work.wait()  # with CUDA it is the current stream that waits
            if self._buffer.is_cuda:  # made on the direction's stream, read on this one
                self._buffer.record_stream(torch.cuda.current_stream(self._buffer.device))
            self._work = None
        parts = self._buffer.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class Transfers:
    """What one rank exchanges with the segments before (left) and after (right) its own.

    Every sp rank must call the same methods in the same order; on the ends of the line the missing neighbour
    makes them no-ops. Rightward and leftward messages never share a communicator.

    Attributes:
        tape: set around a forward pass whose activations will be computed again. While it is replayed,
            ``expect_left`` gives what arrived the first time, and nothing is sent.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.rightward is not None, "transfers need a mesh with sp > 1"
        assert mesh.leftward is not None, "transfers need a mesh with sp > 1"
        self.mesh = mesh
        self.tape: Tape | None = None
        self._rightward = _Direction(mesh.left, mesh.right, mesh.rightward, mesh.device)
        self._leftward = _Direction(mesh.right, mesh.left, mesh.leftward, mesh.device)
        for direction in (self._rightward, self._leftward):
            direction.warm_up()

    def send_right(self, *tensors: Tensor) -> None:
        """Start sending to the next segment; returns at once."""
        if self.tape is None or not self.tape.replaying:
            self._rightward.send(tensors)

    def send_left(self, *tensors: Tensor) -> None:
        """Start sending to the previous segment; returns at once."""
        self._check_no_replay()
        self._leftward.send(tensors)

    def expect_left(self, *like: Tensor) -> Arrival | None:
        """Post the receive of what the previous segment sends right, shaped ``like``; None on the first."""
        if self.tape is None:
            return self._rightward.receive(like)
        return self.tape.received(lambda: self._rightward.receive(like))

    def expect_right(self, *like: Tensor) -> Arrival | None:
        """Post the receive of what the next segment sends left, shaped ``like``; None on the last."""
        self._check_no_replay()
        return self._leftward.receive(like)

    def _check_no_replay(self) -> None:
        assert self.tape is None, "the backward pass's transfers run outside the parts that are recomputed"


class _Direction:
    """Messages one way along the line: where they come from and go to, and what carries them.

    An NCCL send holds its communicator's stream until the neighbour receives. With a communicator and streams
    of its own nothing else waits behind it: neither the compute stream, nor what travels the other way. What
    arrives has another stream than what leaves: a send waits for the compute stream, and for older sends,
    and a receive that was posted behind it would wait with it.
    """

    def __init__(
        self, source: int | None, target: int | None, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._source, self._target, self._group, self._device = source, target, group, device
        on_cuda = device.type == "cuda"
        self._leaving, self._arriving = (torch.cuda.Stream(device) if on_cuda else None for _ in range(2))
        self._pending = _pending.setdefault(group, deque())

    def warm_up(self) -> None:
        """One element along the line: communicators are made here, in the same order on every rank.

        NCCL makes those of two neighbours at their first message, and both wait for it; in the middle of a
        step each rank would get there by its own way.
        """
        token = torch.zeros(1, device=self._device)
        arrival = self.receive([token])
        if arrival is not None:
            arrival.wait()
        self.send([token])

    def send(self, tensors: Sequence[Tensor]) -> None:
        if self._target is None:
            return
        # Always a fresh buffer: nobody else writes to it, and the queue keeps it alive until it has arrived.
        buffer = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        if self._leaving is not None:
            self._leaving.wait_stream(torch.cuda.current_stream(self._device))
            buffer.record_stream(self._leaving)
        with _on(self._leaving):
            work = dist.isend(buffer, dst=self._target, group=self._group)
            assert work is not None, "this rank is outside the group it sends in"
            self._pending.append((work, buffer))
            while len(self._pending) > _MAX_PENDING:
                self._pending[0][0].wait()
                self._pending.popleft()

    def receive(self, like: Sequence[Tensor]) -> Arrival | None:
        if self._source is None:
            return None
        # The buffer is this stream's own, so it need not wait for the compute stream.
        with _on(self._arriving):
            buffer = like[0].new_empty(sum(tensor.numel() for tensor in like))
            work = dist.irecv(buffer, src=self._source, group=self._group)
        assert work is not None, "this rank is outside the group it receives in"
        return Arrival(work, buffer, [tensor.shape for tensor in like])


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    # None would mean the default stream to torch; on a CPU there are none.
    return nullcontext() if stream is None else torch.cuda.stream(stream)
