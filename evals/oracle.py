"""Scripted stand-ins for a language model: they show that a task's scoring can be passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OracleModel", "RecallModel"]

# Logit of the right token; the others are 0. exp(-30) leaves the rest of any vocabulary without mass.
CERTAIN = 30.0


@dataclass(frozen=True)
class _History:
    tokens: Tensor  # [B, T] everything read so far

    def read(self, tokens: Tensor) -> _History:
        """Tokens [B, T] more."""
        return _History(torch.cat([self.tokens, tokens.cpu()], 1))


class OracleModel:
    """Continues a prompt it knows with its known answer, then EOS; predicts token 0 elsewhere.

    Args:
        known: pairs of prompt ids and answer ids.
        vocab_size: V.
        eos_id: follows every answer.
    """

    def __init__(self, known: Sequence[tuple[list[int], list[int]]], *, vocab_size: int, eos_id: int) -> None:
        self._lines = [torch.tensor([*prompt, *answer, eos_id]) for prompt, answer in known]
        self._answer_start = [len(prompt) for prompt, _ in known]
        self._vocab_size = vocab_size

    def init_state(self, batch: int) -> _History:
        """Nothing read."""
        return _History(torch.zeros(batch, 0, dtype=torch.long))

    def prefill(self, tokens: Tensor, state: _History, *, last_only: bool = False) -> tuple[Tensor, _History]:
        """tokens [B, T] -> logits [B, T, V], or the last token's [B, V] only."""
        before, state = state.tokens.shape[1], state.read(tokens)
        first = state.tokens.shape[1] - 1 if last_only else before
        logits = torch.zeros(len(tokens), state.tokens.shape[1] - first, self._vocab_size)
        for row, history in enumerate(state.tokens):
            for line, start in zip(self._lines, self._answer_start):
                self._mark(logits[row], history, line, start=start, before=first)
        return logits[:, -1] if last_only else logits, state

    @staticmethod
    def _mark(logits: Tensor, history: Tensor, line: Tensor, *, start: int, before: int) -> None:
        """Put mass on the tokens of ``line`` that follow positions of ``history`` inside its answer."""
        if len(history) < start or not torch.equal(history[:start], line[:start]):
            return
        for position in range(start - 1, min(len(history), len(line) - 1)):
            if not torch.equal(history[start : position + 1], line[start : position + 1]):
                return
            if position >= before:
                logits[position - before, line[position + 1]] = CERTAIN

    def decode_step(self, tokens: Tensor, state: _History) -> tuple[Tensor, _History]:
        """tokens [B] -> logits [B, V]."""
        return self.prefill(tokens[:, None], state, last_only=True)


class RecallModel:
    """Predicts what followed a token when it was read first, and token 0 after one that is new."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def init_state(self, batch: int) -> _History:
        """Nothing read."""
        return _History(torch.zeros(batch, 0, dtype=torch.long))

    def prefill(self, tokens: Tensor, state: _History, *, last_only: bool = False) -> tuple[Tensor, _History]:
        """tokens [B, T] -> logits [B, T, V], or the last token's [B, V] only."""
        state = state.read(tokens)
        first = state.tokens.shape[1] - (1 if last_only else tokens.shape[1])
        logits = torch.zeros(len(tokens), state.tokens.shape[1] - first, self._vocab_size)
        for row, history in enumerate(state.tokens.tolist()):
            for position in range(first, len(history)):
                logits[row, position - first, self._recall(history, position)] = CERTAIN
        return logits[:, -1] if last_only else logits, state

    @staticmethod
    def _recall(history: list[int], position: int) -> int:
        place = history.index(history[position])
        return history[place + 1] if place < position else 0

    def decode_step(self, tokens: Tensor, state: _History) -> tuple[Tensor, _History]:
        """tokens [B] -> logits [B, V]."""
        return self.prefill(tokens[:, None], state, last_only=True)
