"""What a part of a layer received in its forward pass, kept so that computing it again asks nobody for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

__all__ = ["Receiver", "Tape"]


class Tape:
    """Received things in the order of arrival: recorded by one forward pass, replayed by the same one.

    It belongs to one call of one part of a layer, so (layer, micro-batch) needs no key, and lives as long as
    the autograd graph that may compute that part again.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._position: int | None = None

    @property
    def replaying(self) -> bool:
        """Whether the forward pass is being computed again, and must not communicate."""
        return self._position is not None

    def received(self, communicate: Callable[[], T]) -> T:
        """``communicate()`` in the first pass; the same object again in a replay, which calls nothing."""
        if self._position is None:
            self._kept.append(communicate())
            return self._kept[-1]  # type: ignore[no-any-return]
        assert self._position < len(self._kept), "a recomputed forward pass receives more than the first did"
        self._position += 1
        return self._kept[self._position - 1]  # type: ignore[no-any-return]

    def rewind(self) -> None:
        """From now on replay, beginning with what arrived first."""
        self._position = 0


class Receiver(Protocol):
    """Whatever communicates inside a layer; recomputation sets its tape around a part of the layer."""

    tape: Tape | None
