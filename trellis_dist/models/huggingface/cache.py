"""What `generate` carries from token to token: the states of all layers, and no token or key of the past.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels import CompressState
from trellis_dist.models.baseline_config import MINI_BATCH_KINDS
from trellis_dist.models.config import ATTENTION_KINDS
from trellis_dist.models.kv_cache import KVCache
from trellis_dist.models.language_model import LanguageModel, LMState
from trellis_dist.models.mixers.recurrent import RecurrentState
from trellis_dist.models.mixers.trellis_state import TrellisState
from trellis_dist.models.registry import LayerState

__all__ = ["TrellisCache", "padding"]


class TrellisCache:
    """The states after the tokens seen so far; of recurrent layers their bytes do not grow with the tokens.

    Attention layers of a hybrid keep keys and values, all or those of their window.
    """

    is_compileable = False

    def __init__(self) -> None:
        """Before the first token; `advance` learns the number of rows."""
        self.state: LMState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of ids consumed, padding included."""
        return 0 if self.state is None else self.state.position

    def bytes(self) -> int:
        """Bytes held over all layers and rows."""
        return 0 if self.state is None else self.state.bytes()

    def advance(
        self, model: LanguageModel, tokens: Tensor, mask: Tensor | None, *, last_only: bool = False
    ) -> Tensor:
        """Logits [B, T, V] of `tokens` [B, T] after the rows so far, or [B, 1, V] of the last; no gradients.

        A prompt that is padded on the left is read without its padding, so that each row leaves the state it
        leaves alone; logits over padding are zero.

        Raises:
            ValueError: padding that is not on the left of the prompt, or rows of different lengths for a
                model with attention layers, or with layers of mini-batches.
        """
        starts = _new_padding(mask, tokens, seen=self.get_seq_length())
        if self.state is None and any(starts):
            return self._read_ragged(model, tokens, starts, last_only=last_only)
        state = self.state or model.init_state(len(tokens))
        if tokens.shape[1] == 1 and self.state is not None:
            logits, self.state = model.decode_step(tokens[:, 0], state)
            return logits.unsqueeze(1)
        logits, self.state = model.prefill(tokens, state, last_only=last_only)
        return logits.unsqueeze(1) if last_only else logits

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` [B], in that order: what beam search asks for."""
        if self.state is not None:
            layers = tuple(_rows(layer, beam_idx) for layer in self.state.layers)
            self.state = replace(self.state, layers=layers, batch=len(beam_idx))

    def _read_ragged(
        self, model: LanguageModel, tokens: Tensor, starts: Sequence[int], *, last_only: bool
    ) -> Tensor:
        """Read each row alone from its start on, and put the states together."""
        tied = [kind for kind in model.config.pattern if kind in (*ATTENTION_KINDS, *MINI_BATCH_KINDS)]
        if tied:
            raise ValueError(
                f"rows of different lengths with model.pattern = {list(model.config.pattern)}: {tied[0]} "
                "layers keep rows of one length only; generate from one prompt at a time"
            )
        states, rows = [], []
        for row, start in zip(tokens.unbind(), starts, strict=True):
            logits, state = model.prefill(row[None, start:], model.init_state(1), last_only=last_only)
            states.append(state)
            rows.append(logits if last_only else _padded(logits[0], start))
        layers = tuple(_joined(layer) for layer in zip(*(state.layers for state in states), strict=True))
        self.state = LMState(layers=layers, position=tokens.shape[1], batch=len(tokens))
        return torch.stack(rows)


def padding(mask: Tensor) -> list[tuple[int, int]]:
    """Of each row of `mask` [B, T], where its tokens start and stop. Raises ValueError: not one run."""
    spans = []
    for row in mask.to(torch.bool).cpu():
        kept = row.nonzero().flatten().tolist()
        if not kept or len(kept) != kept[-1] - kept[0] + 1:
            raise ValueError(
                "attention_mask has a row without tokens, or with a hole in them: only padding at the ends "
                "of a row can be left out"
            )
        spans.append((kept[0], kept[-1] + 1))
    return spans


def _new_padding(mask: Tensor | None, tokens: Tensor, *, seen: int) -> list[int]:
    """Where each row of `tokens` starts. `mask` covers what was `seen` too. Raises ValueError."""
    rows, length = tokens.shape
    if mask is None:
        return [0] * rows
    if mask.shape != (rows, seen + length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}: give [{rows}, {seen + length}], the tokens so far and new"
        )
    spans = padding(mask[:, seen:])
    if any(stop != length for _, stop in spans) or (seen and any(start for start, _ in spans)):
        raise ValueError(
            "attention_mask leaves out tokens after the first: a state has read them; pad prompts on the "
            "left (tokenizer.padding_side = 'left')"
        )
    return [start for start, _ in spans]


def _padded(logits: Tensor, start: int) -> Tensor:
    """Logits [T - start, V] with zeros before them: [T, V]."""
    return torch.cat([logits.new_zeros(start, logits.shape[1]), logits])


def _joined(states: Sequence[LayerState]) -> LayerState:
    """The states of single rows as one; each keeps its place in its chunk."""
    if isinstance(states[0], RecurrentState):
        return RecurrentState.joined([state for state in states if isinstance(state, RecurrentState)])
    memories, tails, offsets = [], [], []
    for state in states:
        assert isinstance(state, TrellisState), "other layers were refused before"
        memories.append(_memories(state.memory))
        tails.append(state.tail)
        offsets.append(_offset(state.memory, 0))
    key, value, key_start, value_start = (torch.cat(parts) for parts in zip(*memories, strict=True))
    kept = [tail for tail in tails if tail is not None]
    return TrellisState(
        memory=CompressState(key, value, key_start, value_start, tuple(offsets)),
        tail=torch.cat(kept) if kept else None,
    )


def _rows(state: LayerState, index: Tensor) -> LayerState:
    """The rows `index` [B] of one layer's state."""
    if isinstance(state, KVCache):
        keys, values = (part[index] for part in state.keys_values())
        moved = KVCache.empty(keys[:, :, :0], window=state.window).append(keys, values)
        return replace(moved, position=state.position)
    if isinstance(state, RecurrentState):
        return state.select_rows(index.tolist())
    assert isinstance(state, TrellisState), f"unknown layer state {type(state).__name__}"
    memory = state.memory
    offset = memory.offset
    if not isinstance(offset, int):
        offset = tuple(offset[row] for row in index.tolist())
    key, value, key_start, value_start = (part[index] for part in _memories(memory))
    tail = None if state.tail is None else state.tail[index]
    return TrellisState(memory=CompressState(key, value, key_start, value_start, offset), tail=tail)


def _memories(memory: CompressState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both memories, then what they were at the start of the chunk (themselves where that is not kept)."""
    pair = memory.key_memory, memory.value_memory
    key = pair[0] if memory.key_chunk_start is None else memory.key_chunk_start
    value = pair[1] if memory.value_chunk_start is None else memory.value_chunk_start
    return *pair, key, value


def _offset(memory: CompressState, row: int) -> int:
    return memory.offset if isinstance(memory.offset, int) else memory.offset[row]
