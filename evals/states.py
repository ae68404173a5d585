"""What a model, a tokenizer and the state between two calls must be to be scored.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Ids = list[int]

__all__ = [
    "CausalLM",
    "Ids",
    "TextCodec",
    "context_ids",
    "context_start",
    "map_tensors",
    "select_rows",
    "state_bytes",
]


class CausalLM(Protocol):
    """What is scored: `trellis_dist.models.language_model.LanguageModel` and anything shaped like it."""

    def init_state(self, batch: int) -> Any:
        """State before the first token."""

    def prefill(self, tokens: Tensor, state: Any, *, last_only: bool = False) -> tuple[Tensor, Any]:
        """tokens [B, T] -> logits [B, T, V], or the last token's [B, V] only, and the state after them."""

    def decode_step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """tokens [B] -> logits [B, V] and the state after them."""


class TextCodec(Protocol):
    """The part of `data_pipeline.tokenizer.Tokenizer` that scoring needs.

    A codec whose pieces depend on what stands before them also has ``encode_pair(context, continuation)``
    (evals/peer_codec.py), one whose texts end with more than one token ``end_ids``, and one whose contexts
    begin otherwise than with BOS ``start(ids)``.
    """

    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> Ids:
        """Pieces of a text, without BOS and EOS."""

    def decode(self, ids: Ids) -> str:
        """Text of some pieces."""


def context_start(tokenizer: TextCodec, ids: Sequence[int]) -> Ids:
    """What a model reads before ``ids`` where they begin a context: what the codec says, else BOS."""
    if hasattr(tokenizer, "start"):
        return list(tokenizer.start(ids))
    return [tokenizer.bos_id]


def context_ids(tokenizer: TextCodec, text: str) -> Ids:
    """Token ids of a text that begins a context, at least one."""
    ids = tokenizer.encode(text)
    return [*context_start(tokenizer, ids), *ids]


def map_tensors(
    state: Any, function: Callable[[Tensor], Tensor], own: Callable[[Any], Any] = lambda part: None
) -> Any:
    """Apply ``function`` to every tensor of a state built of dataclasses, tuples, lists and mappings.

    Parts for which ``own`` gives something else than None become that.
    """
    if isinstance(state, Tensor):
        return function(state)
    if (changed := own(state)) is not None:
        return changed
    if is_dataclass(state) and not isinstance(state, type):
        named = {f.name: map_tensors(getattr(state, f.name), function, own) for f in fields(state) if f.init}
        return replace(state, **named)
    if isinstance(state, list | tuple):
        parts = [map_tensors(part, function, own) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if isinstance(state, dict):
        return {key: map_tensors(part, function, own) for key, part in state.items()}
    return state


def select_rows(state: Any, rows: Sequence[int]) -> Any:
    """The state whose row r continues row ``rows[r]`` of ``state``; rows may repeat.

    Every tensor of a state has its rows first; a field ``batch``, where there is one, counts them. A state
    or a part of one that is built otherwise has a method ``select_rows``.
    """
    if hasattr(state, "select_rows"):
        return state.select_rows(rows)
    index = torch.tensor(list(rows), dtype=torch.long)
    chosen = map_tensors(
        state,
        lambda tensor: tensor.index_select(0, index.to(tensor.device)),
        own=lambda part: part.select_rows(rows) if hasattr(part, "select_rows") else None,
    )
    return replace(chosen, batch=len(index)) if hasattr(chosen, "batch") else chosen


def state_bytes(state: Any) -> int:
    """Bytes that a state holds over all rows: what it says itself, else its tensors."""
    if hasattr(state, "bytes"):
        return int(state.bytes())
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(state, count)
    return total
