"""Held-out bits per byte of the whole validation split, beside n-grams on exactly the same targets.

    bits per byte = (sum of token losses in nats) / (ln 2 * bytes of the split's text)

The split is read as in training, in rows of the recipe's sequence length; a document that a row cuts goes on
in the next row without its beginning. The n-grams see the same (token, label) pairs. On several ranks each
batch of rows is scored by one of them; the sums are added in the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from evals.config import EvalConfig
from evals.ngram import InterpolatedBigram, Lower, Unigram, count_ngrams
from evals.ranks import current_ranks
from evals.scorer import LOGIT_BUDGET
from evals.tasks.protocol import Result, Task

if TYPE_CHECKING:
    from evals.runs import LoadedRun
    from trellis_dist.models.language_model import LanguageModel

Array = NDArray[Any]

__all__ = ["TASK", "ContextLosses", "token_losses"]

# Rows are grouped to about this many tokens per forward pass.
BATCH_TOKENS = 8192
FIRST_BUCKET = 16


@torch.no_grad()
def token_losses(model: LanguageModel, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Loss of every position in nats, 0 where the label is -100: [B, T] fp32 (fp64 for an fp64 model)."""
    hidden = model.hidden(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
    step = max(LOGIT_BUDGET // len(model.output_weight), 1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = [
        F.cross_entropy(
            F.linear(hidden[i : i + step], model.output_weight).to(wide),
            labels.flatten()[i : i + step],
            reduction="none",
            ignore_index=-100,
        )
        for i in range(0, len(hidden), step)
    ]
    return torch.cat(parts).view(labels.shape)


@dataclass
class ContextLosses:
    """Sums of losses by the tokens of context before the target: 0-15, 16-31, 32-63, ...

    Attributes:
        loss, tokens: nats and targets per bucket, fp64.
    """

    loss: Array
    tokens: Array

    @classmethod
    def up_to(cls, length: int) -> ContextLosses:
        """Nothing yet; room for targets after fewer than ``length`` tokens."""
        size = int(_bucket(np.array([length]))[0]) + 1
        return cls(np.zeros(size), np.zeros(size))

    def add(self, losses: Array, positions: Array) -> None:
        """Losses [n] of targets after ``positions`` [n] tokens of context."""
        buckets, size = _bucket(positions), len(self.loss)
        self.loss += np.bincount(buckets, weights=losses.astype(np.float64), minlength=size)
        self.tokens += np.bincount(buckets, minlength=size)

    def merge(self, other: ContextLosses) -> None:
        """Add the sums of other targets."""
        self.loss += other.loss
        self.tokens += other.tokens

    def rows(self) -> list[dict[str, float]]:
        """Mean loss of each bucket that holds targets: "from", "to" (exclusive), "tokens", "loss"."""
        edges = [0] + [FIRST_BUCKET * 2**i for i in range(len(self.loss))]
        return [
            {"from": edges[i], "to": edges[i + 1], "tokens": int(tokens), "loss": float(loss / tokens)}
            for i, (loss, tokens) in enumerate(zip(self.loss, self.tokens))
            if tokens
        ]


def _bucket(positions: Array) -> Array:
    return np.where(
        positions < FIRST_BUCKET, 0, np.log2(np.maximum(positions, 1) / FIRST_BUCKET).astype(int) + 1
    )


@dataclass
class _Sums:
    """Sums over scored targets: nats of the model and of each n-gram, and the model's by context."""

    nats: dict[str, float]
    by_context: ContextLosses

    def merge(self, other: _Sums) -> None:
        for name, nats in other.nats.items():
            self.nats[name] = self.nats.get(name, 0.0) + nats
        self.by_context.merge(other.by_context)


class _Baselines:
    """The n-grams, counted on the training split."""

    def __init__(self, unigram: Unigram, bigrams: Mapping[Lower, InterpolatedBigram]) -> None:
        self._unigram, self._bigrams = unigram, bigrams

    def score(self, losses: Array, batch: Batch, length: int) -> _Sums:
        """The sums of one batch, of which the model's ``losses`` [B, T] are given."""
        tokens, labels = batch.tokens.numpy(), batch.labels.numpy()
        scored = labels != -100
        losses, before, target = losses[scored].astype(np.float64), tokens[scored], labels[scored]
        nats = {"model": float(losses.sum()), "unigram": -float(self._unigram.log_prob(target).sum())}
        for lower, bigram in self._bigrams.items():
            nats[f"bigram/{lower}"] = -float(bigram.log_prob(before, target).sum())
        by_context = ContextLosses.up_to(length)
        by_context.add(losses, _positions(batch)[scored])
        return _Sums(nats, by_context)


def _positions(batch: Batch) -> Array:
    """Tokens before each position in its document, inside its row: [B, T]."""
    rows, length = batch.tokens.shape
    starts = np.zeros(rows * length, np.int64)
    starts[batch.cu_seqlens[:-1].numpy()] = batch.cu_seqlens[:-1].numpy()
    starts[::length] = np.arange(0, rows * length, length)
    return (np.arange(rows * length) - np.maximum.accumulate(starts)).reshape(rows, length)


def _run(loaded: LoadedRun, config: EvalConfig, progress: bool) -> Result:
    length = int(loaded.recipe["data"]["sequence_length"])
    validation = TokenDataset(loaded.dataset_dir, "validation", sequence_length=length, seed=0)
    train = TokenDataset(loaded.dataset_dir, "train", sequence_length=length, seed=0, verify=False)
    vocab_size = loaded.tokenizer.vocab_size
    documents = (train.tokens_of(i) for i in range(train.num_documents))
    counts = count_ngrams(documents, vocab_size, max_tokens=config.ngram_max_tokens or None)
    lowers: tuple[Lower, ...] = ("unigram", "kneser_ney")
    bigrams = {lower: InterpolatedBigram(counts, lower=lower) for lower in lowers}
    sums = _score(loaded, validation, _Baselines(Unigram(counts), bigrams), progress)
    scored = int(sums.by_context.tokens.sum())
    expected = validation.num_tokens - validation.num_documents
    assert scored == expected, f"{scored} targets scored, the validation split has {expected}"
    available = train.num_tokens - train.num_documents
    return {
        **_result(sums, scored, validation.num_bytes, vocab_size),
        "ngram_training_targets": counts.tokens,
        "training_targets": available,
    }


def _score(loaded: LoadedRun, split: TokenDataset, baselines: _Baselines, progress: bool) -> _Sums:
    """The sums over every row of a split; rows beyond the last have no labels."""
    length, ranks = split.sequence_length, current_ranks()
    rows = max(BATCH_TOKENS // length, 1)
    loader = BatchLoader(split, global_batch=rows, micro_batch=rows, shuffle=False)

    def score(place: int) -> _Sums:
        (batch,) = loader.micro_batches(place * rows)
        tokens, labels, starts = (x.to(loaded.device) for x in (batch.tokens, batch.labels, batch.cu_seqlens))
        losses = token_losses(loaded.model, tokens, labels, starts).cpu().numpy()
        bar.update()
        return baselines.score(losses, batch, length)

    total = -(-loader.num_batches // ranks.size)
    with tqdm(total=total, desc="perplexity", disable=not progress) as bar:
        parts = ranks.divide(loader.num_batches, score)
    sums = _Sums({}, ContextLosses.up_to(length))
    for part in parts:
        sums.merge(part)
    return sums


def _result(sums: _Sums, scored: int, num_bytes: int, vocab_size: int) -> Result:
    def entry(nats: float) -> dict[str, float]:
        return {"loss": nats / scored, "bits_per_byte": nats / (math.log(2) * num_bytes)}

    lower = min(("unigram", "kneser_ney"), key=lambda name: sums.nats[f"bigram/{name}"])
    return {
        "model": entry(sums.nats["model"]),
        "bigram": {**entry(sums.nats[f"bigram/{lower}"]), "lower_order": lower},
        "bigram_by_lower_order": {
            name.split("/")[1]: entry(n) for name, n in sums.nats.items() if "/" in name
        },
        "unigram": entry(sums.nats["unigram"]),
        "uniform": entry(scored * math.log(vocab_size)),
        "ln_vocab": math.log(vocab_size),
        "targets": scored,
        "bytes": num_bytes,
        "by_position": sums.by_context.rows(),
    }


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    return {"ngram_max_tokens": config.ngram_max_tokens}


def _scalars(result: Result) -> dict[str, float]:
    return {
        "eval/bits_per_byte": result["model"]["bits_per_byte"],
        "eval/loss": result["model"]["loss"],
        "eval/bigram_bits_per_byte": result["bigram"]["bits_per_byte"],
    }


TASK = Task(name="perplexity", needs_run=True, settings=_settings, run=_run, scalars=_scalars)
