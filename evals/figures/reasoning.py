"""Gates and memory norms on reasoning items against prose of the same lengths.

A gate may depend on the place of a token, and items are short: each is compared with a stretch of the prose
that has as many tokens and is read from an empty state too. An item is its context with the right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.figures.correlation import difference
from evals.figures.trace import trace
from evals.runs import LoadedRun
from evals.scorer import Ids
from evals.states import context_ids, context_start
from evals.suites.catalogue import SUITES
from evals.suites.rows import find_file, read_questions

__all__ = ["NAMES", "against_prose", "item_texts", "layer_numbers", "prose_stretches"]

Array = NDArray[np.float64]
NAMES = ("gate", "key_norm", "value_norm")


def item_texts(folder: Path, *, limit: int) -> dict[str, list[str]]:
    """Per suite that has a file in the folder, up to ``limit`` items with their right answers.

    Raises:
        ValueError: the folder has no suite's file, or a row fits no schema.
    """
    found = {}
    for name, suite in SUITES.items():
        try:
            find_file(folder, suite)
        except ValueError:
            continue
        questions = read_questions(folder, suite, limit=limit)
        found[name] = ["".join(q.requests[min(q.gold, len(q.requests) - 1)]) for q in questions]
    if not found:
        raise ValueError(f"--suites {folder}: no file of {', '.join(SUITES)} is there")
    return found


def prose_stretches(run: LoadedRun, prose: Ids, lengths: Sequence[int]) -> list[Ids]:
    """One stretch of the prose for each length in tokens, spread over it, begun as a context is.

    Raises:
        ValueError: the prose is shorter than the longest of them.
    """
    start = context_start(run.tokenizer, [])
    if max(lengths) > len(prose):
        raise ValueError(f"the prose has {len(prose)} tokens, an item {max(lengths)}: give a longer --text")
    places = np.linspace(0, len(prose) - max(lengths), len(lengths)).astype(int)
    return [[*start, *prose[place:][: n - len(start)]] for place, n in zip(places, lengths)]


def against_prose(run: LoadedRun, items: Sequence[str], prose: Ids, *, piece: int) -> list[dict[str, Any]]:
    """Per layer the means over items and over their stretches of prose, and the paired difference.

    Keys: "layer"; for "gate", "key_norm" and "value_norm" (means over heads; of the gate over tokens too, of
    the norms at an item's end) {"items", "prose", "difference": as `correlation.difference`}.
    """
    read = [context_ids(run.tokenizer, item) for item in items]
    stretches = prose_stretches(run, prose, [len(ids) for ids in read])
    layers, own = layer_numbers(run, read, piece=piece)
    _, other = layer_numbers(run, stretches, piece=piece)
    found = []
    for place, layer in enumerate(layers):
        row: dict[str, Any] = {"layer": layer}
        for number, name in enumerate(NAMES):
            x, y = own[:, number, place], other[:, number, place]
            row[name] = {"items": x.mean(), "prose": y.mean(), "difference": difference(x, y)}
        found.append(row)
    return found


def layer_numbers(run: LoadedRun, texts: Sequence[Ids], *, piece: int) -> tuple[tuple[int, ...], Array]:
    """The layers, and [N, 3, L] of NAMES for N texts: means over heads, of the gate over tokens too."""
    rows: list[Array] = []
    layers: tuple[int, ...] = ()
    for ids in texts:
        seen = trace(run.model, torch.tensor([ids], device=run.device), piece=piece)
        parts = (seen.gate[0].double().mean(-1), seen.key_norm[0, ..., -1], seen.value_norm[0, ..., -1])
        rows.append(np.stack([part.double().mean(-1).numpy() for part in parts]))
        layers = seen.layers
    return layers, np.stack(rows)
