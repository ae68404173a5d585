"""A model and batches small enough that engines are tested for their own arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.loader import Batch

VOCAB, WIDTH, ROW = 13, 8, 12


class TinyModel(nn.Module):
    """Embedding, tanh layer, norm weight, output: odd sizes, so that ZeRO splits inside a parameter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(0.5 * torch.randn(*shape, generator=generator))  # noqa: E731
        self.embedding, self.hidden, self.output = draw(VOCAB, WIDTH), draw(WIDTH, WIDTH), draw(VOCAB, WIDTH)
        self.gain, self.bias = nn.Parameter(torch.ones(WIDTH)), draw(VOCAB)
        self.poison, self.factor = 0.0, 1.0  # added to the loss; multiplied into the hidden layer's gradient

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.embedding[tokens] @ self.hidden.T)
        if self.factor != 1.0:
            x.register_hook(lambda gradient: gradient * self.factor)
        x = x * self.gain
        return x @ self.output.T + self.bias

    def loss_sum(self, tokens: Tensor, labels: Tensor, *, cu_seqlens: Tensor, z_loss: float = 0.0) -> Tensor:
        logits = self(tokens).float().flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        if z_loss:
            loss = loss + z_loss * torch.logsumexp(logits, -1)[labels.flatten() >= 0].square().sum()
        return loss + self.poison


def global_rows(step: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, ROW] of a step; row r keeps about 1 / (r + 1) of its labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCAB, (rows, ROW + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):
        labels[row, : ROW - ROW // (row + 1)] = -100
    return tokens[:, :-1].contiguous(), labels


def split(tokens: Tensor, labels: Tensor, *, micro_batch: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """Micro-batches of this rank's contiguous share of the rows."""
    rows = tokens.shape[0] // ranks
    mine = slice(rank * rows, (rank + 1) * rows)
    batches = []
    for t, y in zip(tokens[mine].split(micro_batch), labels[mine].split(micro_batch), strict=True):
        starts = torch.arange(0, t.numel() + 1, t.shape[1], dtype=torch.int32)
        batches.append(Batch(tokens=t, labels=y, cu_seqlens=starts, valid_tokens=int((y >= 0).sum())))
    return batches
