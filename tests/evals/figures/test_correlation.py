"""Correlations and differences against numpy, scipy's definition and known intervals."""

import numpy as np
import pytest

from evals.figures.correlation import correlation, difference


def drawn(count, slope, *, seed=0):
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 2, count).astype(float)
    return slope * right + rng.normal(size=count), right


def test_the_point_biserial_correlation_is_that_of_its_definition():
    x, y = drawn(200, 1.0)
    found = correlation(x, y)
    share = y.mean()
    wanted = (x[y == 1].mean() - x[y == 0].mean()) / x.std() * np.sqrt(share * (1 - share))
    assert found["r"] == pytest.approx(wanted)
    assert found["r"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    # Fisher's interval of r at n = 200.
    low, high = np.tanh(np.arctanh(wanted) + np.array([-1.96, 1.96]) / np.sqrt(197))
    assert found["low"] == pytest.approx(low, abs=0.03)
    assert found["high"] == pytest.approx(high, abs=0.03)


def test_what_is_not_there_is_within_its_interval():
    outside = 0
    for seed in range(40):
        found = correlation(*drawn(60, 0.0, seed=seed), seed=seed)
        outside += not found["low"] <= 0 <= found["high"]
    assert outside <= 7


def test_nothing_to_correlate():
    assert correlation(np.arange(5.0), np.ones(5)) is None
    assert correlation(np.ones(5), np.arange(5.0)) is None
    assert correlation(np.array([0.0, 1.0]), np.array([0.0, 1.0])) is None


def test_a_paired_difference():
    x, y = np.arange(30.0), np.arange(30.0) - 2 + np.tile([-1.0, 1.0], 15)
    found = difference(x, y)
    assert found["difference"] == pytest.approx(2.0)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / np.sqrt(30), rel=0.15)
    assert difference(x[:2], y[:2]) is None
