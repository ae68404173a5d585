"""Tokens a second of reading a prompt, by its length, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evals.runs import LoadedRun
from evals.scorer import Scorer

__all__ = ["prefill_speeds"]


def prefill_speeds(
    runs: Sequence[LoadedRun],
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[dict[str, Any]]]:
    """Of each length the median over ``repeats`` of one row read from an empty state; one reading warms up.

    Runs read in turns, so that what else the machine does meets all of them.

    Returns:
        Per run and length "tokens", "tokens_per_second" (median), "slowest" and "fastest".
    """
    scorers = [Scorer(run.model, run.tokenizer) for run in runs]
    draw = torch.Generator().manual_seed(0)
    found: list[list[dict[str, Any]]] = [[] for _ in runs]
    for length in lengths:
        rows = [torch.randint(r.tokenizer.vocab_size, (1, length), generator=draw).to(r.device) for r in runs]
        turns = [
            [length / _seconds(scorer, row, clock) for scorer, row in zip(scorers, rows)]
            for _ in range(repeats + 1)
        ]
        for own, *speeds in zip(found, *turns[1:]):
            own.append(_speed(length, speeds))
    return found


def _speed(length: int, speeds: Sequence[float]) -> dict[str, Any]:
    return {
        "tokens": length,
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
    }


def _seconds(scorer: Scorer, row: torch.Tensor, clock: Callable[[], float]) -> float:
    _settle(scorer)
    start = clock()
    scorer.read(row, scorer.model.init_state(1))
    _settle(scorer)
    return clock() - start


def _settle(scorer: Scorer) -> None:
    if scorer.device.type == "cuda":
        torch.cuda.synchronize(scorer.device)
