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
    run: LoadedRun,
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Of each length the median over ``repeats`` of one row read from an empty state; one reading warms up.

    Returns:
        "tokens", "tokens_per_second" (median), "slowest" and "fastest".
    """
    scorer = Scorer(run.model, run.tokenizer)
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        row = torch.randint(run.tokenizer.vocab_size, (1, length), generator=draw).to(run.device)
        speeds = [length / _seconds(scorer, row, clock) for _ in range(repeats + 1)][1:]
        found.append(
            {
                "tokens": length,
                "tokens_per_second": statistics.median(speeds),
                "slowest": min(speeds),
                "fastest": max(speeds),
            }
        )
    return found


def _seconds(scorer: Scorer, row: torch.Tensor, clock: Callable[[], float]) -> float:
    _settle(scorer)
    start = clock()
    scorer.read(row, scorer.model.init_state(1))
    _settle(scorer)
    return clock() - start


def _settle(scorer: Scorer) -> None:
    if scorer.device.type == "cuda":
        torch.cuda.synchronize(scorer.device)
