"""The loss of any model on a named text, through the scorer: every byte of the text is scored once.

Each document is read as [BOS] pieces, without an EOS, whose bits are no text's. It is cut into rows of at
most T tokens; a row begins with the last token that the row before it scored, from an empty state:

    BOS p1 ... p(T-1) | p(T) ... p(2T-1) | ...      scored:  p1 ... p(T) | p(T+1) ... p(2T) | ...

So every piece is a target once, whatever the tokenizer, and

    bits per byte = (sum of token losses in nats) / (ln 2 * UTF-8 bytes of the documents)

can be compared between models of different tokenizers. A loss per token cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from evals.losses import NGrams, Sums, Targets
from evals.scorer import Scorer
from evals.states import TextCodec

__all__ = ["score_text"]

# Rows are read together up to about this many tokens.
BATCH_TOKENS = 8192

Array = NDArray[Any]


def score_text(
    scorer: Scorer,
    documents: Sequence[str],
    *,
    length: int,
    ngrams: NGrams | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Losses on whole documents in rows of ``length`` tokens, T; the rows are divided over the ranks.

    Returns:
        As `evals.losses.Sums.result`, with "documents", "length" and "changed_documents": those that the
        tokenizer does not give back as they were, so that less than their bytes was predicted.
    """
    encoded = [scorer.tokenizer.encode(text) for text in documents]
    rows = [row for ids in encoded for row in _rows([scorer.tokenizer.bos_id, *ids], length)]
    batches = list(_batches(rows, scorer))

    def score(place: int) -> Sums:
        part = _score(scorer, [rows[i] for i in batches[place]], length, ngrams)
        bar.update()
        return part

    total = -(-len(batches) // scorer.ranks.size)
    with tqdm(total=total, desc="perplexity, text", disable=not progress) as bar:
        costs = [sum(len(rows[i]) for i in batch) for batch in batches]
        parts = scorer.ranks.divide(len(batches), score, costs=costs)
    sums, pieces = Sums.total(parts, length=length), sum(map(len, encoded))
    if sums.targets != pieces:
        raise RuntimeError(
            f"{sums.targets} of {pieces} tokens were scored: the ranks cut other batches; give every rank "
            "the same model, and GPUs of equal memory"
        )
    return {
        **sums.result(
            size=sum(len(text.encode()) for text in documents), vocab_size=scorer.tokenizer.vocab_size
        ),
        "documents": len(documents),
        "length": length,
        "changed_documents": sum(
            not _gives_back(scorer.tokenizer, ids, text) for ids, text in zip(encoded, documents)
        ),
    }


def _rows(ids: Sequence[int], length: int) -> Iterator[Array]:
    """Rows of at most 1 + ``length`` of a document's ids: each one's last token begins the next."""
    for start in range(0, len(ids) - 1, length):
        yield np.array(ids[start : start + length + 1], np.int64)


def _batches(rows: Sequence[Array], scorer: Scorer) -> Iterator[list[int]]:
    """Indices of rows that are read together, shortest first."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        most = min(BATCH_TOKENS // len(rows[i]), scorer.row_limit(len(rows[i])))
        if batch and len(batch) >= most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(scorer: Scorer, rows: Sequence[Array], length: int, ngrams: NGrams | None) -> Sums:
    """Of one batch, right-padded: padding comes after every target of a causal model."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    is_target = np.arange(1, width) < np.array([[len(row)] for row in rows])
    log_probs, _ = scorer.log_probs(
        torch.from_numpy(tokens).to(scorer.device), scorer.model.init_state(len(rows))
    )
    positions = np.broadcast_to(np.arange(width - 1), is_target.shape)
    targets = Targets(tokens[:, :-1][is_target], tokens[:, 1:][is_target], positions[is_target])
    losses = -log_probs.double().cpu().numpy()[is_target]
    return Sums.of(losses, targets, length=length, ngrams=ngrams)


def _gives_back(tokenizer: TextCodec, ids: list[int], text: str) -> bool:
    """Whether pieces are a text again; a tokenizer may put a space before it."""
    found = tokenizer.decode(ids)
    return found == text or found == f" {text}"
