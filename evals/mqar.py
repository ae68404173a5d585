"""Multi-query associative recall (Arora et al., arXiv 2312.04927) with the pieces of any tokenizer.

A row of D = 2 pairs and L = 12 tokens after what starts a context (BOS, say), "." the filler:

    tokens    <s> k1 v1 k2 v2  .  .  k2 .  .  .  k1 .
    predicts                         v2          v1

Every key is asked for once, in one of (L - 2 D) / 2 places of two tokens; place g (from 0) has a probability
proportional to (g + 1)^(a - 1), a = 0.01: near ones are the likelier, as with the gaps between repeated
bigrams of text. The answer is not in the row again. Keys and values come from two ranges of pieces.

Shapes: N rows, D pairs, S tokens that start a context (0 or more), L tokens after them, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evals.scorer import LOGIT_BUDGET, Ids, Scorer, TextCodec

__all__ = ["Pieces", "Rows", "find_pieces", "make_rows", "predict"]

POWER = 0.01
# Keys, and values, that are drawn from at most; the paper has 4,096 of each.
MOST = 4096
# Tokens of the rows that are read together: bounds the states of a model whose states grow.
BATCH_TOKENS = 2**15


@dataclass(frozen=True)
class Pieces:
    """Token ids by their use."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    filler: int


@dataclass(frozen=True)
class Rows:
    """N rows.

    Attributes:
        tokens: [N, S + L].
        asked: [N, D] positions of the repeated keys, increasing.
        answers: [N, D] the value of the key at each of them.
    """

    tokens: Tensor
    asked: Tensor
    answers: Tensor

    def part(self, chosen: slice) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[chosen], self.asked[chosen], self.answers[chosen])

    def labels(self) -> Tensor:
        """[N, S + L] what the model must predict at each position, -100 where nothing: for training."""
        return torch.full_like(self.tokens, -100).scatter(1, self.asked, self.answers)


def find_pieces(tokenizer: TextCodec, *, pairs: int) -> Pieces:
    """Pieces that the tokenizer makes of their own text; by id the filler, then keys, then values.

    Raises:
        ValueError: there are too few for ``pairs`` pairs.
    """
    order = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(order)  # a sample of a large vocabulary, not its first pieces
    found: Ids = []
    for piece in order:
        if len(found) == 2 * MOST + 1:
            break
        if piece not in (tokenizer.bos_id, tokenizer.eos_id) and _ordinary(tokenizer, piece):
            found.append(piece)
    if len(found) < 2 * pairs + 1:
        raise ValueError(
            f"evals.mqar_pairs = {pairs} needs {2 * pairs + 1} ordinary pieces and the tokenizer has "
            f"{len(found)}: use fewer pairs"
        )
    filler, *rest = sorted(found)
    half = len(rest) // 2
    return Pieces(tuple(rest[:half]), tuple(rest[half:]), filler)


def _ordinary(tokenizer: TextCodec, piece: int) -> bool:
    text = tokenizer.decode([piece])
    return bool(text) and tokenizer.encode(text) == [piece]


def make_rows(
    pieces: Pieces, *, start: Sequence[int], pairs: int, length: int, indices: Sequence[int], seed: int
) -> Rows:
    """Rows by their indices: row ``i`` depends on (seed, pairs, length, i) and on nothing else.

    Args:
        start: the S tokens that start a context.
        length: L, even and at least 4 ``pairs``.
    """
    assert length % 2 == 0, f"{length} tokens are an odd number: refused by the configuration"
    assert length >= 4 * pairs, f"{length} tokens hold {length // 4} pairs: refused by the configuration"
    places = (length - 2 * pairs) // 2
    weights = np.arange(1, places + 1) ** (POWER - 1)
    weights /= weights.sum()
    first = len(start)
    tokens = np.full((len(indices), first + length), pieces.filler)
    tokens[:, :first] = start
    asked = np.zeros((len(indices), pairs), dtype=np.int64)
    answers = np.zeros_like(asked)
    for row, index in enumerate(indices):
        rng = np.random.default_rng([seed, pairs, length, index])
        keys = rng.choice(pieces.keys, pairs, replace=False)
        values = rng.choice(pieces.values, pairs, replace=False)
        tokens[row, first : first + 2 * pairs] = np.stack([keys, values], 1).ravel()
        gaps = rng.choice(places, pairs, replace=False, p=weights)
        order = gaps.argsort()
        asked[row] = first + 2 * pairs + 2 * gaps[order]
        answers[row] = values[order]
        tokens[row, asked[row]] = keys[order]
    return Rows(*(torch.from_numpy(part.astype(np.int64)) for part in (tokens, asked, answers)))


def predict(scorer: Scorer, rows: Rows) -> Tensor:
    """The most probable piece of the whole vocabulary after each repeated key: [N, D], on the CPU.

    On several ranks the batches are divided over them.
    """
    size = max(min(scorer.max_rows, BATCH_TOKENS // rows.tokens.shape[1]), 1)
    batches = [rows.part(slice(start, start + size)) for start in range(0, len(rows.tokens), size)]
    found = scorer.ranks.divide(len(batches), lambda place: _predict(scorer, batches[place]).numpy())
    return torch.from_numpy(np.concatenate(found))


@torch.no_grad()
def _predict(scorer: Scorer, rows: Rows) -> Tensor:
    """What comes before the first question is read without logits, the rest in pieces of bounded logits."""
    tokens, count = rows.tokens.to(scorer.device), len(rows.tokens)
    first, end = int(rows.asked.min()), int(rows.asked.max()) + 1
    state = scorer.read(tokens[:, :first], scorer.model.init_state(count))
    vocab_size = scorer.tokenizer.vocab_size
    piece = max(LOGIT_BUDGET // (vocab_size * count), 1)
    best = []
    for start in range(first, end, piece):
        part = tokens[:, start : min(start + piece, end)]
        logits, state = scorer.model.prefill(part, state)  # [N, piece, V]
        # A model may have more rows than the tokenizer has pieces.
        best.append(logits[..., :vocab_size].argmax(-1).cpu())
    return torch.cat(best, 1).gather(1, rows.asked - first)
