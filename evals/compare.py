"""Two results on the same samples: is the second really better, or does the draw of the samples say so?

Paired bootstrap (Efron 1979; Koehn 2004 for systems on one test set): the samples are drawn anew with
replacement, and each time both results are averaged over the same draw. With d_i = second_i - first_i, a
resample's difference is sum_i c_i d_i / n, where the counts c are multinomial(n; 1/n, ..., 1/n). Samples of
the same d are exchangeable, so it is enough to draw how often each *value* of d comes: an exact shortcut that
makes 10,000 resamples of a task with few distinct scores a matter of milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RESAMPLES", "compare"]

RESAMPLES = 10_000
SEED = 20_251
# Numbers drawn at a time: bounds the memory where every difference is another.
CHUNK = 4_000_000


def compare(
    first: NDArray[np.float64], second: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, float]:
    """The second result against the first.

    Args:
        first, second: scores from 0 to 1 of the same n samples in the same order, n >= 1: [n].
        resamples: draws of the samples.
        seed: equal seeds give equal numbers.

    Returns:
        In percent points: "first", "second" (means), "difference" (second - first), and its 95% interval
        "low", "high" (percentiles of the resamples). "samples": n. "p_better": share of the resamples in
        which the second is better, ties counted half.
    """
    assert len(first) == len(second) > 0, f"{len(first)} and {len(second)} scores are no pairs"
    means = _resampled(second - first, resamples=resamples, seed=seed)
    low, high = np.percentile(means, (2.5, 97.5))
    # A mean of cancelling differences is a tie also where rounding leaves a little.
    sign = np.sign(np.where(np.abs(means) < 1e-12, 0.0, means))
    return {
        "first": 100 * float(first.mean()),
        "second": 100 * float(second.mean()),
        "difference": 100 * float((second - first).mean()),
        "low": 100 * float(low),
        "high": 100 * float(high),
        "samples": len(first),
        "p_better": float((sign > 0).mean() + (sign == 0).mean() / 2),
    }


def _resampled(differences: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``resamples`` draws of n differences with replacement: [resamples]."""
    values, counts = np.unique(differences, return_counts=True)
    n, generator = len(differences), np.random.default_rng(seed)
    rows = max(CHUNK // len(values), 1)
    means = [
        generator.multinomial(n, counts / n, size=min(rows, resamples - start)) @ values / n
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)
