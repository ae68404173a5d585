"""Bits per byte: of a run on its whole validation split beside n-grams, and of any model on a named text.

    bits per byte = (sum of token losses in nats) / (ln 2 * bytes of the text)

The split is read as in training, in rows of the recipe's sequence length; a document that a row cuts goes on
in the next row without its beginning. The n-grams see the same (token, label) pairs. On several ranks each
batch of rows is scored by one of them; the sums are added in the order of the rows. How a named text
(``evals.perplexity_text``) is read, evals/text_losses.py says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from evals.config import EvalConfig
from evals.losses import NGrams, Sums, Targets
from evals.ngram import InterpolatedBigram, Lower, NgramCounts, Unigram, count_ngrams
from evals.ranks import current_ranks
from evals.runs import LoadedRun
from evals.scorer import LOGIT_BUDGET, Scorer
from evals.tasks.protocol import Result, Task
from evals.text_losses import score_text
from evals.texts import read_documents, text_digest

if TYPE_CHECKING:
    from evals.subject import Subject
    from trellis_dist.models.language_model import LanguageModel

Array = NDArray[Any]

__all__ = ["TASK", "token_losses"]

# Rows are grouped to about this many tokens per forward pass.
BATCH_TOKENS = 8192
# Tokens of a row of a named text, where neither the settings nor the model say otherwise.
TEXT_LENGTH = 2048


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


def _positions(batch: Batch) -> Array:
    """Tokens before each position in its document, inside its row: [B, T]."""
    rows, length = batch.tokens.shape
    starts = np.zeros(rows * length, np.int64)
    starts[batch.cu_seqlens[:-1].numpy()] = batch.cu_seqlens[:-1].numpy()
    starts[::length] = np.arange(0, rows * length, length)
    return (np.arange(rows * length) - np.maximum.accumulate(starts)).reshape(rows, length)


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    """The held-out split of a run, and a named text with any model."""
    result: Result = {}
    ngrams = None
    if isinstance(subject, LoadedRun):
        counts, available = _count(subject, config)
        lowers: tuple[Lower, ...] = ("unigram", "kneser_ney")
        bigrams = {lower: InterpolatedBigram(counts, lower=lower) for lower in lowers}
        ngrams = NGrams(Unigram(counts), bigrams)
        result = _held_out(subject, ngrams, progress)
        result |= {"ngram_training_targets": counts.tokens, "training_targets": available}
    if config.perplexity_text:
        result["on_text"] = {
            "digest": text_digest(config.perplexity_text),
            **score_text(
                Scorer(subject.model, subject.tokenizer),
                read_documents(config.perplexity_text),
                length=config.perplexity_length or _row_length(subject),
                ngrams=ngrams,
                progress=progress,
            ),
        }
    assert result, "a model that is no run has no held-out text: refused before"
    return result


def _row_length(subject: Subject) -> int:
    """What a run was trained on; of another model 2,048 tokens, or as many as it has positions."""
    if isinstance(subject, LoadedRun):
        return int(subject.recipe["data"]["sequence_length"])
    return min(TEXT_LENGTH, getattr(subject.model, "positions", None) or TEXT_LENGTH)


def _count(loaded: LoadedRun, config: EvalConfig) -> tuple[NgramCounts, int]:
    """N-grams of the training split, and how many of its targets there are."""
    length = int(loaded.recipe["data"]["sequence_length"])
    train = TokenDataset(loaded.dataset_dir, "train", sequence_length=length, seed=0, verify=False)
    documents = (train.tokens_of(i) for i in range(train.num_documents))
    vocab_size = loaded.tokenizer.vocab_size
    counts = count_ngrams(documents, vocab_size, max_tokens=config.ngram_max_tokens or None)
    return counts, train.num_tokens - train.num_documents


def _held_out(loaded: LoadedRun, ngrams: NGrams, progress: bool) -> Result:
    """Every row of the validation split; rows beyond the last have no labels."""
    length, ranks = int(loaded.recipe["data"]["sequence_length"]), current_ranks()
    split = TokenDataset(loaded.dataset_dir, "validation", sequence_length=length, seed=0)
    rows = max(BATCH_TOKENS // length, 1)
    loader = BatchLoader(split, global_batch=rows, micro_batch=rows, shuffle=False)

    def score(place: int) -> Sums:
        (batch,) = loader.micro_batches(place * rows)
        tokens, labels, starts = (x.to(loaded.device) for x in (batch.tokens, batch.labels, batch.cu_seqlens))
        losses = token_losses(loaded.model, tokens, labels, starts).cpu().numpy()
        bar.update()
        scored = batch.labels.numpy() != -100
        parts = (batch.tokens.numpy(), batch.labels.numpy(), _positions(batch))
        targets = Targets(*(part[scored] for part in parts))
        return Sums.of(losses[scored], targets, length=length, ngrams=ngrams)

    total = -(-loader.num_batches // ranks.size)
    with tqdm(total=total, desc="perplexity", disable=not progress) as bar:
        sums = Sums.total(ranks.divide(loader.num_batches, score), length=length)
    expected = split.num_tokens - split.num_documents
    assert sums.targets == expected, f"{sums.targets} targets scored, the validation split has {expected}"
    return sums.result(size=split.num_bytes, vocab_size=loaded.tokenizer.vocab_size)


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    """A named text counts by its content."""
    settings: dict[str, Any] = {"ngram_max_tokens": config.ngram_max_tokens}
    if config.perplexity_text:
        settings |= {"text": text_digest(config.perplexity_text), "length": config.perplexity_length}
    return settings


def _scalars(result: Result) -> dict[str, float]:
    """Of held-out text below "eval/", of a named one below "eval/text/"."""
    scalars = {}
    for prefix, part in (("eval/", result), ("eval/text/", result.get("on_text", {}))):
        for name in ("model", "bigram"):
            label = "" if name == "model" else f"{name}_"
            if name in part:
                scalars[f"{prefix}{label}bits_per_byte"] = part[name]["bits_per_byte"]
        if "model" in part:
            scalars[f"{prefix}loss"] = part["model"]["loss"]
    return scalars


TASK = Task(
    name="perplexity", needs_run=True, takes_text=True, settings=_settings, run=_run, scalars=_scalars
)
