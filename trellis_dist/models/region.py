"""Calling a part of a layer through one replaceable attribute: what is recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Region", "call"]


class Region(Protocol):
    """What a layer calls its parts through; parallel/ replaces it by one that checkpoints activations."""

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``."""
        ...


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Keep every activation."""
    return function(*args)
