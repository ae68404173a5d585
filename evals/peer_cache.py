"""The cache of a Hugging Face model as a state: kept intact, copied for each continuation, its rows chosen.

A model of `transformers` changes the cache that it is given: attention layers bind longer keys and values in
it, recurrent layers write into their tensors. A state here is therefore never given away; the model gets a
copy. What a cache is made of is found by walking it, so that it may be any class: every tensor with as many
entries in its first dimension as the cache has rows holds rows. Whether that was right for a model, it is
asked when it is loaded (evals/peers.py).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["PeerState", "copied"]

# Layers whose update makes new tensors: a copy may share them, which saves copying all keys at every token.
_MAKE_NEW = ("DynamicLayer", "DynamicSlidingWindowLayer")
# Where an object counts its rows.
_COUNTS = ("batch", "batch_size", "max_batch_size")


@dataclass(frozen=True)
class PeerState:
    """What a model of `transformers` has read.

    Attributes:
        batch: rows.
        length: tokens read of each row.
        cache: what the model returned; None before the first token, and of a model that returns none.
        history: [B, length] tokens read, where they may have to be read again; otherwise None.
    """

    batch: int
    length: int
    cache: Any
    history: Tensor | None

    def select_rows(self, rows: Sequence[int]) -> PeerState:
        """The state whose row r continues row ``rows[r]``; rows may repeat."""
        history = self.history
        if history is not None:
            history = history[torch.tensor(list(rows), device=history.device)]
        chosen = copied(self.cache, batch=self.batch, rows=rows)
        return replace(self, batch=len(rows), cache=chosen, history=history)

    def bytes(self) -> int:
        """Bytes that the cache says it holds (one of ours does), else of its tensors, each counted once."""
        history = 0 if self.history is None else self.history.numel() * self.history.element_size()
        if hasattr(self.cache, "bytes"):
            return int(self.cache.bytes()) + history
        walk = _Bytes()
        walk.of(self.cache)
        return walk.total + history


def copied(cache: Any, *, batch: int, rows: Sequence[int] | None = None) -> Any:
    """A copy of a cache of ``batch`` rows that can be continued without changing it.

    Args:
        rows: which rows the copy has, in that order; None keeps all.
    """
    return _Copy(batch, rows).of(cache)


class _Walk(ABC):
    """Rebuilds a value from its parts; an object met twice is rebuilt once."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._alive: list[Any] = []  # so that no id is used again

    def of(self, value: Any, *, shared: bool = False) -> Any:
        if id(value) in self._done:
            return self._done[id(value)]
        if isinstance(value, Tensor):
            return self._remember(value, self.tensor(value, shared=shared))
        if isinstance(value, list | tuple):
            parts = [self.of(part, shared=shared) for part in value]
            made = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            return self._remember(value, made)
        if isinstance(value, dict):
            made = self._remember(value, copy.copy(value))
            made.update({key: self.of(part, shared=shared) for key, part in value.items()})
            return made
        if hasattr(value, "__dict__") and not callable(value):
            made = self._remember(value, copy.copy(value))
            shared = type(value).__name__ in _MAKE_NEW
            made.__dict__.update(self.attributes(vars(value), shared=shared))
            return made
        return value

    def attributes(self, values: Mapping[str, Any], *, shared: bool) -> dict[str, Any]:
        return {name: self.of(value, shared=shared) for name, value in values.items()}

    def _remember(self, value: Any, made: Any) -> Any:
        self._done[id(value)] = made
        self._alive.append(value)
        return made

    @abstractmethod
    def tensor(self, tensor: Tensor, *, shared: bool) -> Tensor:
        """What stands for ``tensor``."""


class _Copy(_Walk):
    def __init__(self, batch: int, rows: Sequence[int] | None) -> None:
        super().__init__()
        self._batch = batch
        self._rows = None if rows is None else torch.tensor(list(rows))

    def attributes(self, values: Mapping[str, Any], *, shared: bool) -> dict[str, Any]:
        made = super().attributes(values, shared=shared)
        if self._rows is not None:
            counts = {name for name in _COUNTS if type(made.get(name)) is int and made[name] == self._batch}
            made.update(dict.fromkeys(counts, len(self._rows)))
        return made

    def tensor(self, tensor: Tensor, *, shared: bool) -> Tensor:
        if self._rows is not None and tensor.dim() and len(tensor) == self._batch:
            return tensor.index_select(0, self._rows.to(tensor.device))
        return tensor if shared or not tensor.dim() else tensor.clone()


class _Bytes(_Walk):
    """Counts the tensors and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def tensor(self, tensor: Tensor, *, shared: bool) -> Tensor:
        self.total += tensor.numel() * tensor.element_size()
        return tensor
