"""Activation recomputation that never asks another segment: what a forward pass received is kept on a tape.

    "selective"  before the operation | operation | after it | SwiGLU half     the operation alone is kept
    "full"       the whole block                                               nothing is kept but its input

A rank computes its part again when the first gradient reaches it. Its neighbours are elsewhere in their
backward passes by then, and a transfer would tie it to them layer by layer; so the received memories and
halos are replayed and nothing is sent. Transfers of the backward pass itself belong to nodes that run after
the recomputation they may trigger, outside the replay.

Collectives of tensor parallelism do run again: all ranks of a tp group compute the same layer at the same
time, and keeping their results would keep the activations that recomputation is to save.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from trellis_dist.models.block import Block
from trellis_dist.models.region import Region
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.tape import Receiver, Tape
from trellis_dist.parallel.transfers import Transfers

__all__ = ["RecomputeMode", "apply_recompute"]

RecomputeMode = Literal["selective", "full"]


def apply_recompute(
    model: nn.Module, *, mode: RecomputeMode, transfers: Transfers | None, segments: Segments
) -> None:
    """Compute activations of every block of ``model`` again in the backward pass, in place.

    Args:
        mode: "selective" keeps what the operation (the sequential part, with its transfers) needs, "full"
            only each block's input.
        transfers: what state passing and the convolution receive through; None where neither is split.
        segments: the documents of the batch, which are restored for a recomputation.
    """
    for module in model.modules():
        if isinstance(module, Block):
            region = _region(_receivers(module, transfers), segments)
            if mode == "full":
                module.whole = region
            else:
                module.region = module.mixer.region = region  # type: ignore[assignment]


def _receivers(block: Block, transfers: Transfers | None) -> tuple[Receiver, ...]:
    """Whatever may receive from other segments inside ``block``."""
    operation: Any = block.mixer.operation
    own: list[Receiver] = [operation] if hasattr(operation, "tape") else []
    return (*own, *([] if transfers is None else [transfers]))


def _region(receivers: tuple[Receiver, ...], segments: Segments) -> Region:
    if segments.mesh.sp == 1:
        return _checkpointed  # no contexts, so that it also works inside a graph of torch.compile
    return _TapedRegion(receivers, segments)


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # there is no dropout


class _TapedRegion:
    """Calls a part of a layer so that its activations are computed again from its inputs and its tape."""

    def __init__(self, receivers: tuple[Receiver, ...], segments: Segments) -> None:
        self._receivers = receivers
        self._segments = segments

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
        )

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What the first pass of one call runs under, and what its recomputations do."""
        tape = Tape()
        return (
            _Recording(tape, self._receivers),
            _Replaying(tape, self._receivers, self._segments),
        )


class _Recording(AbstractContextManager[None]):
    def __init__(self, tape: Tape, receivers: tuple[Receiver, ...]) -> None:
        self._tape, self._receivers = tape, receivers

    def __enter__(self) -> None:
        for receiver in self._receivers:
            assert receiver.tape is None, "parts of a layer that are recomputed do not nest"
            receiver.tape = self._tape

    def __exit__(self, *error: object) -> None:
        for receiver in self._receivers:
            receiver.tape = None


class _Replaying(_Recording):
    """With the documents of the first pass: other micro-batches may have been cut since."""

    def __init__(self, tape: Tape, receivers: tuple[Receiver, ...], segments: Segments) -> None:
        super().__init__(tape, receivers)
        self._segments, self._documents = segments, segments.documents

    def __enter__(self) -> None:
        super().__enter__()
        self._tape.rewind()
        self._current, self._segments.documents = self._segments.documents, self._documents

    def __exit__(self, *error: object) -> None:
        self._segments.documents = self._current
        super().__exit__(*error)
