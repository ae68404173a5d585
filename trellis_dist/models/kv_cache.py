"""The growing state of an attention layer: keys and values of every token seen, or of the last ``window``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["KVCache"]

_FIRST_CAPACITY = 64


@dataclass
class _Buffer:
    """Storage shared by the states of one sequence; ``used`` tokens of it are written."""

    keys: Tensor  # [B, H, capacity, D]
    values: Tensor
    used: int


@dataclass(frozen=True)
class KVCache:
    """An immutable view of a buffer that doubles when it is full, so appending costs O(1) per token.

    Appending to a state that already has a successor (two continuations of one prefix) copies the buffer, so
    the first successor keeps its tokens.

    Attributes:
        start, stop: this state's tokens inside the buffer.
        position: tokens seen since the sequence began.
        window: tokens that later queries can still see; None keeps all.
    """

    buffer: _Buffer
    start: int
    stop: int
    position: int
    window: int | None

    @classmethod
    def empty(cls, like: Tensor, *, window: int | None) -> KVCache:
        """No tokens yet; ``like`` [B, H, 0, D] gives shape, dtype and device."""
        return cls(buffer=_Buffer(like, like, 0), start=0, stop=0, position=0, window=window)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Both [B, H, kept, D], oldest first, without copying."""
        return self.buffer.keys[:, :, self.start : self.stop], self.buffer.values[
            :, :, self.start : self.stop
        ]

    def append(self, keys: Tensor, values: Tensor) -> KVCache:
        """The state after ``keys``, ``values`` [B, H, T, D]."""
        new = keys.shape[2]
        twice = 2 * (self.stop - self.start + new)
        state = self if self._can_grow_by(new) else self._moved(max(_FIRST_CAPACITY, twice))
        stop = state.stop + new
        state.buffer.keys[:, :, state.stop : stop] = keys
        state.buffer.values[:, :, state.stop : stop] = values
        state.buffer.used = stop
        start = state.start if self.window is None else max(state.start, stop - self.window)
        return KVCache(state.buffer, start, stop, self.position + new, self.window)

    def reserve(self, capacity: int) -> KVCache:
        """The same state in a buffer for ``capacity`` tokens in all: for a known length, without doubling."""
        assert capacity >= self.stop - self.start, f"{capacity} tokens do not hold what the cache keeps"
        return self._moved(capacity)

    def bytes(self) -> int:
        """Bytes of the buffer, its spare room included: up to twice what the kept keys and values take."""
        return sum(part.numel() * part.element_size() for part in (self.buffer.keys, self.buffer.values))

    def _can_grow_by(self, new: int) -> bool:
        return self.buffer.used == self.stop and self.stop + new <= self.buffer.keys.shape[2]

    def _moved(self, capacity: int) -> KVCache:
        """The same tokens at the start of a new buffer for ``capacity`` tokens."""
        kept = self.stop - self.start
        keys, values = self.keys_values()
        shape = list(keys.shape)
        shape[2] = capacity
        buffer = _Buffer(keys.new_empty(shape), values.new_empty(shape), kept)
        buffer.keys[:, :, :kept], buffer.values[:, :, :kept] = keys, values
        return KVCache(buffer, 0, kept, self.position, self.window)
