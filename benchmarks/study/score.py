"""A finished run on whole books: sums of nats by book, part of a book and range of positions.

A book is read in eight consecutive parts, each in rows of T tokens from an empty state, as
``evals.text_losses`` reads a text: every token of the book is a target once. The parts are what the intervals
resample inside a book. The bigram, counted on the same training text, is scored on the same targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.books import Book, Split, find_books, parts_of
from benchmarks.study.intervals import Losses
from data_pipeline.loader import TokenDataset
from data_pipeline.tokenizer import Tokenizer
from evals.ngram import InterpolatedBigram, Unigram, count_ngrams
from evals.scorer import Scorer
from evals.text_losses import score_text

__all__ = ["EDGES", "PARTS", "bigram_nats", "edges_up_to", "losses_of", "score_books", "totals"]

PARTS = 8
# First positions of the ranges; the last one ends with the row.
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def edges_up_to(length: int) -> tuple[int, ...]:
    """First positions of the ranges that rows of ``length`` tokens have."""
    return tuple(edge for edge in EDGES if edge < length)


def texts_of(book: Book, folder: Path, characters: int | None) -> list[str]:
    """The parts of a book, or of its first so many characters."""
    return parts_of(book.read(folder)[:characters], PARTS)


def score_books(
    scorer: Scorer, folder: Path, split: Split, *, length: int, characters: int | None = None
) -> dict[str, Any]:
    """Per book of a split: "bytes", and "parts", for each [nats, targets] by range of positions.

    Args:
        folder: of the raw books.
        length: T, tokens of a row.
        characters: only so many of each book; None reads whole books.
    """
    found = {}
    for book in find_books(split):
        texts = texts_of(book, folder, characters)
        parts = [_part(score_text(scorer, [text], length=length), length) for text in texts]
        found[book.name] = {"bytes": sum(len(text.encode()) for text in texts), "parts": parts}
    return found


def _part(result: Mapping[str, Any], length: int) -> list[list[float]]:
    """[nats, targets] of each range."""
    edges = edges_up_to(length)
    sums = [[0.0, 0] for _ in edges]
    for row in result["by_position"]:
        place = max(i for i, edge in enumerate(edges) if edge <= row["from"])
        sums[place][0] += row["loss"] * row["tokens"]
        sums[place][1] += row["tokens"]
    return [[round(nats, 3), int(targets)] for nats, targets in sums]


def totals(books: Mapping[str, Any]) -> dict[str, Any]:
    """Nats per token, bits per byte and targets over books as `score_books` gives them."""
    parts = [part for book in books.values() for part in book["parts"]]
    nats, targets = (sum(row[i] for part in parts for row in part) for i in (0, 1))
    size = sum(book["bytes"] for book in books.values())
    return {"loss": nats / targets, "bits_per_byte": nats / (math.log(2) * size), "targets": targets}


def losses_of(scored: Mapping[int, Mapping[str, Any]], *, length: int) -> Losses:
    """The results of `score_books` by seed, as arrays."""
    seeds, books = tuple(sorted(scored)), tuple(next(iter(scored.values())))
    sums = np.array([[scored[seed][book]["parts"] for book in books] for seed in seeds])  # [S, B, P, K, 2]
    assert (sums[..., 1] == sums[:1, ..., 1]).all(), "the seeds were scored on the same targets"
    return Losses(sums[..., 0], sums[0, ..., 1], edges_up_to(length), seeds, books)


def bigram_nats(
    data: Path, folder: Path, splits: Iterable[tuple[Split, int | None]]
) -> dict[str, dict[str, Any]]:
    """Of the interpolated bigram and the unigram, counted on the training split of ``data``.

    Args:
        data: the prepared data set.
        splits: (split, characters of each book or None) pairs.

    Returns:
        "SPLIT" or "SPLIT-CHARACTERS" -> book -> "bytes", "targets" and nats of "unigram" and of the bigram
        over either lower order, "unigram_order" and "kneser_ney".
    """
    train = TokenDataset(data, "train", sequence_length=1024, seed=0)
    codec = Tokenizer.load(data / "tokenizer.model")
    counts = count_ngrams((train.tokens_of(i) for i in range(train.num_documents)), codec.vocab_size)
    orders = {
        "kneser_ney": InterpolatedBigram(counts, lower="kneser_ney"),
        "unigram_order": InterpolatedBigram(counts, lower="unigram"),
    }
    unigram, found = Unigram(counts), {}
    for split, characters in splits:
        name = split if characters is None else f"{split}-{characters}"
        found[name] = {
            book.name: _ngrams(codec, texts_of(book, folder, characters), unigram, orders)
            for book in find_books(split)
        }
    return found


def _ngrams(
    codec: Tokenizer, texts: Sequence[str], unigram: Unigram, orders: Mapping[str, InterpolatedBigram]
) -> dict[str, Any]:
    sums: dict[str, float] = {"unigram": 0.0, **dict.fromkeys(orders, 0.0)}
    targets = 0
    for text in texts:
        ids = np.array([codec.bos_id, *codec.encode(text)], np.int64)
        targets += len(ids) - 1
        sums["unigram"] -= float(unigram.log_prob(ids[1:]).sum())
        for name, bigram in orders.items():
            sums[name] -= float(bigram.log_prob(ids[:-1], ids[1:]).sum())
    size = sum(len(text.encode()) for text in texts)
    return {"bytes": size, "targets": targets, **{name: round(nats, 3) for name, nats in sums.items()}}
