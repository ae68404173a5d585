"""Small stand-ins for tests that need no trained model: a byte tokenizer and three language models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

BYTES = 256


class ByteTokenizer:
    """One token per UTF-8 byte, then BOS and EOS."""

    bos_id, eos_id, vocab_size = BYTES, BYTES + 1, BYTES + 2

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < BYTES).decode(errors="replace")


@dataclass(frozen=True)
class RecurrentState:
    """Hidden [B, H] and how many tokens it has seen."""

    hidden: torch.Tensor
    position: int = 0


class RecurrentModel(nn.Module):
    """fp64 tanh recurrence: every logit depends on the whole history, so a wrong state shows."""

    def __init__(self, vocab_size=ByteTokenizer.vocab_size, hidden=24, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.inputs, self.recurrent = (
            weights(vocab_size, hidden),
            nn.Parameter(weights(hidden, hidden).data / 5),
        )
        self.outputs = weights(hidden, vocab_size)
        self.most_tokens = 0

    def init_state(self, batch):
        return RecurrentState(torch.zeros(batch, self.inputs.shape[1], dtype=torch.float64))

    def prefill(self, tokens, state, *, last_only=False):
        self.most_tokens = max(self.most_tokens, tokens.numel())
        rows = []
        for column in tokens.T:
            logits, state = self.decode_step(column, state)
            rows.append(logits)
        return rows[-1] if last_only else torch.stack(rows, 1), state

    def decode_step(self, tokens, state):
        hidden = torch.tanh(self.inputs[tokens] + state.hidden @ self.recurrent)
        return hidden @ self.outputs, replace(state, hidden=hidden, position=state.position + 1)

    def log_probs(self, ids):
        """Log-probability of each token after the first, from scratch: [T - 1]."""
        logits, _ = self.prefill(torch.tensor([ids[:-1]]), self.init_state(1))
        return logits[0].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@dataclass(frozen=True)
class Position:
    position: int


class RandomModel:
    """Logits without any relation to what was read."""

    def __init__(self, vocab_size=ByteTokenizer.vocab_size, seed=0):
        self.vocab_size, self.generator = vocab_size, torch.Generator().manual_seed(seed)

    def init_state(self, batch):
        return Position(0)

    def prefill(self, tokens, state, *, last_only=False):
        logits = torch.randn(*tokens.shape, self.vocab_size, generator=self.generator)
        return logits[:, -1] if last_only else logits, Position(state.position + tokens.shape[1])

    def decode_step(self, tokens, state):
        return self.prefill(tokens[:, None], state, last_only=True)
