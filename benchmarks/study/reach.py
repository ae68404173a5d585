"""How far back the trained models look: what context is worth to them, and how long their gates keep.

Context: the same targets are read with W to 2W - 1 tokens before them, for W up to half a training row. The
difference to the longest is paired by target: no position's text is compared with another's.
Gates: a memory whose writes decay by beta a token has lost half of one after ln 2 / mean(-log beta) tokens.

Shapes: R rows of 2W tokens, B books, P parts of each, H heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.study.books import find_books
from benchmarks.study.intervals import Losses, difference
from benchmarks.study.plan import plan
from benchmarks.study.score import texts_of
from evals.figures.trace import trace, trellis_mixers
from evals.runs import load_run
from evals.scorer import Scorer
from trellis_dist.models.language_model import LanguageModel
from trellis_dist.models.mixers.recurrent import RecurrentMixer

__all__ = ["CONTEXTS", "half_lives", "measure", "nats_with"]

CONTEXTS = (16, 32, 64, 128, 256, 512)
TOKENS = 8192  # read together
# What the recurrent baselines call the logarithm of what a token leaves of the memory.
DECAYS = ("log_decay", "log_keep")
Array = NDArray[np.float64]
Results = Mapping[str, Mapping[str, Any]]


def measure(results: Results, *, books: Path, work: Path, known: Results | None = None) -> dict[str, Any]:
    """Per full run of seed 0: "contexts", rows by W (nats per token, and less the longest's); "half_lives".

    Args:
        results: finished runs by name.
        books: folder of the raw books.
        work: folder of the runs and their data.
        known: what was measured before; of runs that are still the same it is kept.

    Raises:
        ValueError: no full run is finished.
        OSError: a run's folder is gone.
    """
    names = [name for name in results if name.startswith("full-") and name.endswith("-s0")]
    if not names:
        raise ValueError("no full run of seed 0 is finished: go on with the plan first")
    torch.set_num_threads(plan()["computes"]["threads"])
    same = {
        name: found
        for name, found in (known or {}).items()
        if found["digest"] == results.get(name, {}).get("digest")
    }
    left = [name for name in names if name not in same]
    return same | {name: {"digest": results[name]["digest"], **_of_run(name, books, work)} for name in left}


def _of_run(name: str, books: Path, work: Path) -> dict[str, Any]:
    run = load_run(work / "runs" / name, device=plan()["computes"]["device"], dataset_dir=work / "data")
    scorer, characters = Scorer(run.model, run.tokenizer), plan()["sizes"]["tuning_characters"]
    texts = [texts_of(book, books, characters) for book in find_books("validation")]
    ids = [[[run.tokenizer.bos_id, *run.tokenizer.encode(text)] for text in book] for book in texts]
    losses = {context: _losses(scorer, ids, context) for context in CONTEXTS}
    longest = losses[max(CONTEXTS)]
    rows = [
        {"context": context, "loss": round(found.mean, 5), **difference(found, longest).row()}
        for context, found in losses.items()
    ]
    length = 2 * max(CONTEXTS)
    heads = [book[0][:length] for book in ids if len(book[0]) >= length]
    return {"contexts": rows, "half_lives": half_lives(run.model, torch.tensor(heads, device=run.device))}


def _losses(scorer: Scorer, ids: list[list[list[int]]], context: int) -> Losses:
    found = np.array([[nats_with(scorer, part, context) for part in book] for book in ids])  # [B, P, 2]
    return Losses(found[None, ..., :1], found[..., 1:], (0,), (0,), tuple(map(str, range(len(ids)))))


def nats_with(scorer: Scorer, ids: list[int], context: int) -> tuple[float, float]:
    """Nats and number of the targets that have ``context`` to 2 ``context`` - 1 tokens before them.

    They are those from the longest context on, up to the last whole one: the same for every context.
    """
    longest = max(CONTEXTS)
    end = (len(ids) - 1) // longest * longest
    starts = range(longest - context, end - context, context)
    nats = 0.0
    for first in range(0, len(starts), step := TOKENS // (2 * context)):
        rows = torch.tensor(
            [ids[start : start + 2 * context + 1] for start in starts[first : first + step]],
            device=scorer.device,
        )
        log_probs, _ = scorer.log_probs(rows, scorer.model.init_state(len(rows)))
        nats -= float(log_probs[:, context:].double().sum())
    return nats, float(max(end - longest, 0))


@torch.no_grad()
def half_lives(model: LanguageModel, tokens: Tensor) -> dict[str, list[list[float | None]]]:
    """Tokens until half of a write is left, by layer, of each head's memories; None where it stays.

    Args:
        tokens: [R, T].

    Returns:
        "memory", and of Trellis with gates of its own for the value pass "value memory"; a gate per slot or
        feature counts as memories of its own. A layer without decay has no entry, nor beside Trellis layers
        one of another kind.
    """
    if trellis_mixers(model):
        seen = trace(model, tokens, piece=tokens.shape[1])
        both = {"memory": seen.log_gate, "value memory": seen.log_value_gate}
        return {
            name: [_lives(layer) for layer in gate.transpose(0, 1).transpose(2, 3)]
            for name, gate in both.items()
            if gate is not None
        }
    with _decays(model) as seen_by_layer:
        model.prefill(tokens, model.init_state(len(tokens)), last_only=True)
    return {"memory": [_lives(x) for x in seen_by_layer]}


def _lives(log_decay: Tensor) -> list[float | None]:
    """Of log beta [R, T, H, ...], ascending."""
    lost = -log_decay.double().mean((0, 1)).flatten()
    found = (math.log(2) / x if x > 0 else math.inf for x in lost.tolist())
    return [round(x, 2) if math.isfinite(x) else None for x in sorted(found)]


@contextlib.contextmanager
def _decays(model: LanguageModel) -> Iterator[list[Tensor]]:
    """Within it every recurrent baseline's log decays [R, T, H, ...] are noted as its operation gets them."""
    mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, RecurrentMixer)]
    own, seen = [mixer.operation for mixer in mixers], []

    def noted(operation: Any) -> Any:
        def call(given: dict[str, Tensor], *rest: Any) -> Any:
            seen.extend(given[name] for name in DECAYS if name in given)
            return operation(given, *rest)

        return call

    for mixer in mixers:
        mixer.operation = noted(mixer.operation)
    try:
        yield seen
    finally:
        for mixer, operation in zip(mixers, own, strict=True):
            mixer.operation = operation
