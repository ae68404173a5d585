"""Gates and memory norms by place in a text: means over heads and over all texts that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.figures.trace import trace
from evals.runs import LoadedRun
from evals.scorer import Ids

__all__ = ["BINS", "by_position"]

Array = NDArray[np.float64]
BINS = 16


def by_position(run: LoadedRun, texts: Sequence[Ids]) -> dict[str, Any]:
    """Texts from an empty state, in BINS equal parts of the longest one (as many as it has tokens, if fewer).

    A short text counts in the bins that it fills, so that all places of a bin are of the same texts; what is
    left over after the last bin is not read.

    Returns:
        "ends": tokens read at the end of each bin; "texts": how many fill it; "gate" (means over its tokens),
        "key_norm" and "value_norm" (at its end): of each layer a list over bins.
    """
    longest = max(map(len, texts))
    piece = max(longest // BINS, 1)
    bins = min(longest // piece, BINS)
    sums: Array | None = None
    counts = np.zeros(bins)
    for ids in texts:
        filled = min(len(ids) // piece, bins)
        if not filled:
            continue
        numbers = _numbers(run, ids[: filled * piece], piece)
        sums = np.zeros((*numbers.shape[:2], bins)) if sums is None else sums
        sums[..., :filled] += numbers
        counts[:filled] += 1
    assert sums is not None, "the longest text fills every bin"
    names = ("gate", "key_norm", "value_norm")
    ends = [piece * (place + 1) for place in range(bins)]
    means = dict(zip(names, (sums / counts).tolist()))
    return {"ends": ends, "texts": counts.astype(int).tolist(), **means}


def _numbers(run: LoadedRun, ids: Ids, piece: int) -> Array:
    """Gate, |S| and |R| of a text of whole bins, means over heads: [3, L, P]."""
    seen = trace(run.model, torch.tensor([ids], device=run.device), piece=piece)
    gate = seen.gate[0].double().unflatten(-1, (-1, piece)).mean(-1)
    parts = torch.stack([gate, seen.key_norm[0].double(), seen.value_norm[0].double()])
    found: Array = parts.mean(2).numpy()
    return found
