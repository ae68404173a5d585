"""What memories keep of a needle until it is asked for, and whether it was found: per item.

A single needle in repeated noise (``niah_single_1``) is asked for as `trellis eval` does. Its gap is the
tokens between the needle and the question; an item is right when the needle is preferred to nine others.
Multi-query recall: from the last pair to the last question, and the share of a row's answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.config import EvalConfig
from evals.figures.retention import Items, accuracy
from evals.figures.trace import Trace, trace
from evals.mqar import find_pieces, make_rows, predict
from evals.ruler.catalogue import RULER
from evals.ruler.question import Question
from evals.runs import LoadedRun
from evals.scorer import Scorer
from evals.states import context_ids, context_start
from evals.tasks.ruler import CHANCE, score_questions

__all__ = ["mqar_items", "needle_items", "span_of"]

Array = NDArray[np.float64]
# Of an answer that is written: none is read here, the choice is what counts.
WRITTEN = 1


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
    traces = ((_read(run, question, piece), span_of(run, question)) for question in questions)
    found = [(seen.layers, _passes(seen), _retained(seen, 0, *span)) for seen, span in traces]
    layers, passes, _ = found[0]
    chance = dict.fromkeys(groups, CHANCE)
    items = Items(layers, passes, np.stack([kept for *_, kept in found]), right, tuple(groups), chance)
    return items, accuracy(items)


def span_of(run: LoadedRun, question: Question) -> tuple[int, int]:
    """Tokens after the needle's value and before the question, as places [first, end) of its prompt."""
    prompt, value = question.prompt, question.answers[0]
    after, asked = prompt.index(value) + len(value), prompt.rindex("\nWhat ")
    first, end = (len(context_ids(run.tokenizer, prompt[:place])) for place in (after, asked))
    return first, max(end, first + 1)


def _read(run: LoadedRun, question: Question, piece: int) -> Trace:
    return trace(run.model, torch.tensor([question.ids], device=run.device), piece=piece)


def _passes(seen: Trace) -> tuple[str, ...]:
    return ("keys",) if seen.log_value_gate is None else ("keys", "values")


def _retained(seen: Trace, row: int, first: int, end: int) -> Array:
    """Sum of log beta over the tokens [first, end) of a row: [L, P, H]."""
    gates = [gate for gate in (seen.log_gate, seen.log_value_gate) if gate is not None]
    sums = [gate[row, :, :, first:end].double().sum(-1) for gate in gates]
    kept: Array = torch.stack(sums, 1).numpy()
    return kept


def mqar_items(run: LoadedRun, config: EvalConfig, *, count: int, piece: int) -> tuple[Items, list[Any]]:
    """``count`` rows of multi-query recall for each number of pairs, at the shortest of the lengths.

    Chance is one of the row's own values, which needs no recall of a key.

    Raises:
        ValueError: the tokenizer has too few pieces.
    """
    scorer = Scorer(run.model, run.tokenizer)
    pieces = find_pieces(run.tokenizer, pairs=max(config.mqar_pairs))
    length, start = min(config.mqar_length), context_start(run.tokenizer, [pieces.filler])
    kept: list[Array] = []
    right: list[float] = []
    groups: list[str] = []
    layers: tuple[int, ...] = ()
    passes: tuple[str, ...] = ()
    chance: dict[str, float] = {}
    for pairs in sorted(set(config.mqar_pairs)):
        rows = make_rows(
            pieces, start=start, pairs=pairs, length=length, indices=range(count), seed=config.mqar_seed
        )
        right += (predict(scorer, rows) == rows.answers).double().mean(1).tolist()
        seen = trace(run.model, rows.tokens.to(run.device), piece=piece)
        first = len(start) + 2 * pairs
        for row, last in enumerate(rows.asked[:, -1].tolist()):
            kept.append(_retained(seen, row, first, max(last, first + 1)))
        groups += [f"{pairs}/{length}"] * count
        layers, passes = seen.layers, _passes(seen)
        chance[groups[-1]] = 100.0 / pairs
    items = Items(layers, passes, np.stack(kept), np.array(right), tuple(groups), chance)
    return items, accuracy(items)
