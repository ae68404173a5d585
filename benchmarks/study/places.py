"""Where in a chunk the stale gradient hurts: the stale update beside the corrected one, by place.

A stale update takes the gradients of all C tokens of a chunk at the memories of its start, which are j writes
old for the token at place j. So two models that differ in that alone are scored on the same targets, and
their paired difference is kept by place, t mod C, of every token t behind the first chunk.

Shapes: R rows of T tokens, C tokens of a chunk, K ranges of places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.study.books import find_books
from benchmarks.study.intervals import Losses, difference
from benchmarks.study.plan import OURS, STALE, plan
from benchmarks.study.score import texts_of
from benchmarks.study.tables import base_of
from evals.runs import load_run
from evals.scorer import Scorer

__all__ = ["measure", "pairs", "sums_by_place"]

RANGES = 8
ROWS = 8  # read together
Array = NDArray[np.float64]
Results = Mapping[str, Mapping[str, Any]]


def pairs(results: Results) -> list[tuple[str, str]]:
    """(stale, corrected) runs that are finished: a change at 2M tokens, the full runs of seed 0."""
    changed = [
        f"vary-{name}" for name, entry in plan()["variants"].items() if entry["set"] == plan()["stale"]["set"]
    ]
    wanted = [(name, base_of(results, name)) for name in changed if name in results]
    wanted.append((f"full-{STALE}-s0", f"full-{OURS}-s0"))
    return [(name, base) for name, base in wanted if name in results and base is not None and base in results]


def measure(results: Results, *, books: Path, work: Path) -> dict[str, Any]:
    """Per pair its rows: first place, loss of the corrected one, the stale one's less that, its interval.

    Raises:
        ValueError: no pair is finished.
        OSError: a run's folder is gone.
    """
    if not (found := pairs(results)):
        raise ValueError("no stale run is finished beside a corrected one: go on with the plan first")
    return {
        f"{stale} less {base}": _rows(*(_losses(name, results[name], books, work) for name in (stale, base)))
        for stale, base in found
    }


def _rows(stale: Losses, base: Losses) -> list[dict[str, Any]]:
    found = []
    for place, first in enumerate(base.edges):
        one, other = (_only(losses, place) for losses in (stale, base))
        found.append({"from": first, "loss": round(other.mean, 5), **difference(one, other).row()})
    return found


def _only(losses: Losses, place: int) -> Losses:
    kept = slice(place, place + 1)
    return Losses(losses.nats[..., kept], losses.tokens[..., kept], (0,), losses.seeds, losses.books)


def _losses(name: str, result: Mapping[str, Any], books: Path, work: Path) -> Losses:
    """Of the beginnings of the validation books, which a run at 2M tokens was scored on."""
    torch.set_num_threads(plan()["computes"]["threads"])
    loaded = load_run(work / "runs" / name, device=plan()["computes"]["device"], dataset_dir=work / "data")
    scorer, length = Scorer(loaded.model, loaded.tokenizer), int(result["about"]["length"])
    chunk, characters = loaded.model.config.trellis.chunk_size, plan()["sizes"]["tuning_characters"]
    split = list(find_books("validation"))

    def of(text: str) -> Array:
        return sums_by_place(scorer, text, length=length, chunk=chunk)

    sums = np.array(
        [[of(text) for text in texts_of(book, books, characters)] for book in split]
    )  # [B, P, K, 2]
    edges = tuple(range(0, chunk, chunk // RANGES))
    names = tuple(book.name for book in split)
    return Losses(sums[None, ..., 0], sums[..., 1], edges, (0,), names)


def sums_by_place(scorer: Scorer, text: str, *, length: int, chunk: int) -> Array:
    """[K, 2]: nats and targets by range of places, of whole rows of ``length`` tokens from empty states.

    The first chunk of a row is left out: its memories are the initial ones for both updates.
    """
    found = np.zeros((RANGES, 2))
    places = np.arange(length) % chunk * RANGES // chunk
    places[:chunk] = RANGES  # a range of its own, dropped below
    for rows in _batches([scorer.tokenizer.bos_id, *scorer.tokenizer.encode(text)], length):
        state = scorer.model.init_state(len(rows))
        log_probs, _ = scorer.log_probs(torch.from_numpy(rows).to(scorer.device), state)
        losses = -log_probs.double().cpu().numpy().sum(0)  # [T]
        found[:, 0] += np.bincount(places, losses, RANGES + 1)[:RANGES]
        found[:, 1] += len(rows) * np.bincount(places, minlength=RANGES + 1)[:RANGES]
    return found


def _batches(ids: list[int], length: int) -> Iterator[NDArray[np.int64]]:
    """Rows [R, T + 1] whose last token begins the next; what is left of the text is no row."""
    count = (len(ids) - 1) // length
    rows = [ids[i * length : (i + 1) * length + 1] for i in range(count)]
    for first in range(0, count, ROWS):
        yield np.array(rows[first : first + ROWS], np.int64)
