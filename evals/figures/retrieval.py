"""Gates while a needle has to be kept, and whether it was found: per item, for a correlation.

A single needle in repeated noise (``niah_single_1``) is asked for as `trellis eval` does. The gate of an item
is the mean of beta over the tokens between the needle and the question, of each layer and head: what the
memory kept of the needle is the product of those. An item is right when the needle is preferred to nine other
numbers. Multi-query recall: beta between the pairs and the last question, and the share of a row's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.config import EvalConfig
from evals.figures.correlation import correlation
from evals.figures.trace import trace
from evals.mqar import find_pieces, make_rows, predict
from evals.ruler.catalogue import RULER
from evals.ruler.question import Question
from evals.runs import LoadedRun
from evals.scorer import Scorer
from evals.states import context_ids, context_start
from evals.tasks.ruler import score_questions

__all__ = ["Items", "correlations", "mqar_items", "needle_items", "span_of"]

Array = NDArray[np.float64]
# Of an answer that is written: none is read here, the choice is what counts.
WRITTEN = 1
# Items that are not what most of their group are, from which a correlation is given. Simulated without one,
# 95% intervals held 0 in 87 to 91% of cases at 3 to 6 of them (of 60 to 120), 91 to 92% at 12, 94% at 30.
OTHERS = 10


@dataclass(frozen=True)
class Items:
    """Items that were read.

    Attributes:
        layers: numbers of the Trellis layers, L.
        gates: mean beta of each item's tokens that count [N, L, H].
        right: 1 or 0, or a share of answers [N].
        groups: what an item is one of: a length in tokens, or "pairs/tokens".
    """

    layers: tuple[int, ...]
    gates: Array
    right: Array
    groups: tuple[str, ...]


def needle_items(
    run: LoadedRun, *, lengths: Sequence[int], count: int, piece: int, seed: int = 42
) -> tuple[Items, list[dict[str, Any]]]:
    """Single needles in noise, ``count`` of each length; also accuracy in percent by length.

    Raises:
        ValueError: a length too short for the question.
    """
    scorer, make = Scorer(run.model, run.tokenizer), RULER["niah_single_1"].questions("")
    encode = partial(context_ids, run.tokenizer)
    questions, groups = [], []
    for length in lengths:
        for index in range(count):
            questions.append(make(seed=seed, length=length, index=index, encode=encode))
            groups.append(str(length))
    outcomes = score_questions(scorer, questions, answer_tokens=WRITTEN)
    right = np.array([float(o.chosen in q.answers) for o, q in zip(outcomes, questions)])
    found = [_gate(run, question, piece) for question in questions]
    items = Items(found[0][0], np.stack([gates for _, gates in found]), right, tuple(groups))
    return items, accuracy(items)


def accuracy(items: Items) -> list[dict[str, Any]]:
    """Of each group its items and the percentage that is right."""
    names = np.array(items.groups)
    parts = {name: items.right[names == name] for name in dict.fromkeys(items.groups)}
    return [
        {"group": name, "items": len(right), "percent": 100 * float(right.mean())}
        for name, right in parts.items()
    ]


def span_of(run: LoadedRun, question: Question) -> tuple[int, int]:
    """Tokens after the needle's value and before the question, as places [first, end) of its prompt."""
    prompt, value = question.prompt, question.answers[0]
    after, asked = prompt.index(value) + len(value), prompt.rindex("\nWhat ")
    first, end = (len(context_ids(run.tokenizer, prompt[:place])) for place in (after, asked))
    return first, max(end, first + 1)


def _gate(run: LoadedRun, question: Question, piece: int) -> tuple[tuple[int, ...], Array]:
    first, end = span_of(run, question)
    seen = trace(run.model, torch.tensor([question.ids], device=run.device), piece=piece)
    return seen.layers, seen.gate[0, :, :, first:end].double().mean(-1).numpy()


def mqar_items(run: LoadedRun, config: EvalConfig, *, count: int, piece: int) -> tuple[Items, list[Any]]:
    """``count`` rows of multi-query recall for each number of pairs, at the shortest of the lengths.

    Raises:
        ValueError: the tokenizer has too few pieces.
    """
    scorer = Scorer(run.model, run.tokenizer)
    pieces = find_pieces(run.tokenizer, pairs=max(config.mqar_pairs))
    length, start = min(config.mqar_length), context_start(run.tokenizer, [pieces.filler])
    gates: list[Array] = []
    right: list[float] = []
    groups: list[str] = []
    layers: tuple[int, ...] = ()
    for pairs in sorted(set(config.mqar_pairs)):
        rows = make_rows(
            pieces, start=start, pairs=pairs, length=length, indices=range(count), seed=config.mqar_seed
        )
        right += (predict(scorer, rows) == rows.answers).double().mean(1).tolist()
        seen = trace(run.model, rows.tokens.to(run.device), piece=piece)
        first = len(start) + 2 * pairs
        for row, last in enumerate(rows.asked[:, -1].tolist()):
            gates.append(seen.gate[row, :, :, first : max(last, first + 1)].double().mean(-1).numpy())
        groups += [f"{pairs}/{length}"] * count
        layers = seen.layers
    items = Items(layers, np.stack(gates), np.array(right), tuple(groups))
    return items, accuracy(items)


def correlations(items: Items) -> list[dict[str, Any]]:
    """Per layer the correlation of its mean gate with being right; what its groups differ in is taken out.

    Longer prompts are harder and have other gates: both are centred within each group, so that a correlation
    is one between items of one group. None where fewer than OTHERS items are not what most of their group
    are.
    """
    names = np.array(items.groups)
    enough = sum(_others(items.right[names == group]) for group in set(items.groups)) >= OTHERS

    def centred(x: Array) -> Array:
        result = x.astype(np.float64)
        for name in set(items.groups):
            result[names == name] -= x[names == name].mean()
        return result

    varied = np.isin(names, [group for group in names if _others(items.right[names == group])])
    found = []
    for place, layer in enumerate(items.layers):
        gate, right = centred(items.gates[:, place].mean(-1)), centred(items.right)
        kept = correlation(gate[varied], right[varied]) if enough else None
        found.append({"layer": layer, "correlation": kept})
    return found


def _others(right: Array) -> int:
    """Items that are not what most are."""
    return len(right) - int(np.unique(right, return_counts=True)[1].max())
