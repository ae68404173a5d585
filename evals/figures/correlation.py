"""Correlations over items, each with a bootstrap interval, and differences of means with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["correlation", "difference"]

Array = NDArray[np.float64]
# Of the bootstrap: resamples of the items with replacement; percentiles of a 95% interval.
DRAWS, LOW, HIGH = 2000, 2.5, 97.5
# Fewer items than this say nothing.
LEAST = 3


def correlation(x: Array, y: Array, *, seed: int = 0) -> dict[str, float] | None:
    """Pearson's r of x and y [n], "low" and "high" of a 95% percentile bootstrap over the items, and "items".

    Where y is 0 or 1 this is the point-biserial correlation. None where x or y does not vary, and of fewer
    than three items: there is nothing to correlate.
    """
    if len(x) < LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found = _spread(lambda places: _pearson(x[places], y[places]), len(x), seed)
    return {"r": float(_pearson(x, y)), **found, "items": len(x)}


def difference(x: Array, y: Array, *, seed: int = 0) -> dict[str, float] | None:
    """Mean of x - y over paired items [n], "low" and "high" as in `correlation`; None of fewer than three."""
    if len(x) < LEAST:
        return None
    apart = x - y
    found = _spread(lambda places: apart[places].mean(-1), len(x), seed)
    return {"difference": float(apart.mean()), **found, "items": len(x)}


def _spread(statistic: Callable[[NDArray[Any]], Array], count: int, seed: int) -> dict[str, float]:
    """Of a statistic [DRAWS] of resampled places [DRAWS, n]."""
    drawn = statistic(np.random.default_rng(seed).integers(0, count, (DRAWS, count)))
    low, high = np.nanpercentile(drawn, [LOW, HIGH])
    return {"low": float(low), "high": float(high)}


def _pearson(x: Array, y: Array) -> Array:
    """Over the last dimension; NaN where one of them does not vary, as in a resample of equal items."""
    dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    length = np.sqrt((dx * dx).sum(-1) * (dy * dy).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(length > 0, (dx * dy).sum(-1) / length, np.nan)
    return found
