"""Host copies of a rank's slices, taken while training goes on.

    CUDA tensors   copied on a stream of their own into pinned memory: the next update waits on the device
    host tensors   copied by the thread that will write them: the next update waits for it

The buffers are kept from save to save: pinned memory is slow to get, and so is memory never touched before.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from checkpoints.logical import LogicalTensor

__all__ = ["HostBuffers", "Snapshot"]


class HostBuffers:
    """Memory for one snapshot at a time, by tensor name and offset."""

    def __init__(self) -> None:
        """Start with none."""
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def like(self, item: LogicalTensor) -> Tensor:
        """A host tensor of the shape and type of ``item.local``, pinned if that is on a GPU."""
        key, wanted = (item.name, tuple(item.offset)), item.local
        held = self._buffers.get(key)
        if held is None or (held.shape, held.dtype) != (wanted.shape, wanted.dtype):
            held = torch.empty(wanted.shape, dtype=wanted.dtype, pin_memory=wanted.is_cuda)
            self._buffers[key] = held
        return held

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Snapshot:
    """One snapshot. The thread that trains makes it and calls ``wait``, the one that writes ``finish``."""

    def __init__(self, tensors: Sequence[LogicalTensor], buffers: HostBuffers | None) -> None:
        """Take over ``tensors``, whose values must not change before ``wait`` has returned.

        Without ``buffers`` nothing is copied: the values must not change before they are written.
        """
        self._tensors, self._buffers = tensors, buffers
        self._copied = threading.Event()
        if buffers is None:
            self._copied.set()
        self._event: torch.cuda.Event | None = None
        if buffers is not None and any(item.local.is_cuda for item in tensors):
            self._event = self._copy_from_device(buffers)

    def _copy_from_device(self, buffers: HostBuffers) -> torch.cuda.Event:
        stream, event = torch.cuda.Stream(), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())  # after the update that made these values
        with torch.cuda.stream(stream), torch.no_grad():
            for item in self._tensors:
                if item.local.is_cuda:
                    buffers.like(item).copy_(item.local, non_blocking=True)
            event.record(stream)
        return event

    @torch.no_grad()
    def finish(self, proceed: Callable[[], None]) -> Sequence[LogicalTensor]:
        """Copy what is in host memory, wait for the rest; returns the same slices in host memory.

        ``proceed`` is called before each copy; what it raises ends it.
        """
        if self._buffers is None:
            return self._tensors
        try:
            copies = []
            for item in self._tensors:
                proceed()
                copies.append(self._in_host_memory(item, self._buffers))
        finally:
            self._copied.set()
        if self._event is not None:
            self._event.synchronize()
        self._tensors = ()  # the originals may go
        return copies

    @staticmethod
    def _in_host_memory(item: LogicalTensor, buffers: HostBuffers) -> LogicalTensor:
        copy = buffers.like(item)
        if not item.local.is_cuda:
            copy.copy_(item.local)
        return dataclasses.replace(item, local=copy)

    def wait(self) -> None:
        """Return once the originals may change: on a GPU, once what is queued from now on may change them."""
        self._copied.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
