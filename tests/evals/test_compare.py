"""The paired bootstrap against what is known of its numbers."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from evals import compare as module
from evals.compare import compare


def pairs(generator, n, *, first=0.5, gain=0.1):
    """n paired scores of 0 or 1, correlated through a common difficulty; means `first` and `first + gain`."""
    difficulty = generator.random(n)
    return (difficulty < first).astype(float), (difficulty < first + gain).astype(float)


def test_the_interval_holds_the_true_difference_in_95_of_100_draws():
    generator, hits, misses_low = np.random.default_rng(7), 0, 0
    for trial in range(1000):
        first, second = pairs(generator, 200)
        flip = generator.random(200) < 0.1  # and some noise of the second
        second = np.where(flip, 1 - second, second)
        truth = 100 * (0.6 * 0.9 + 0.4 * 0.1 - 0.5)
        found = compare(first, second, resamples=1000, seed=trial)
        hits += found["low"] <= truth <= found["high"]
        misses_low += truth < found["low"]
    assert 0.93 < hits / 1000 < 0.97
    assert 0.01 < misses_low / 1000 < 0.045


def test_the_spread_is_that_of_the_mean_of_the_differences():
    generator = np.random.default_rng(0)
    first, second = generator.random(400), generator.random(400)
    means = module._resampled(second - first, resamples=20_000, seed=1)
    assert means.std() == pytest.approx((second - first).std() / 20, rel=0.02)
    assert means.mean() == pytest.approx((second - first).mean(), abs=0.001)
    plain = np.random.default_rng(2).choice(second - first, size=(20_000, 400)).mean(1)
    assert np.percentile(means, (2.5, 50, 97.5)) == pytest.approx(
        np.percentile(plain, (2.5, 50, 97.5)), abs=0.002
    )


def test_numbers_are_percent_points_of_the_second_against_the_first():
    first, second = np.array([0.0, 1.0, 0.5, 0.0]), np.array([1.0, 1.0, 0.5, 0.0])
    found = compare(first, second)
    assert (found["first"], found["second"], found["difference"]) == (37.5, 62.5, 25.0)
    assert (found["low"], found["high"], found["samples"]) == (0.0, 75.0, 4)
    # No draw is worse; (3/4)^4 of them leave the one better sample out: ties, counted half.
    assert found["p_better"] == pytest.approx(1 - 0.75**4 / 2, abs=0.01)
    back = compare(second, first)
    assert back["difference"] == -25.0
    assert back["p_better"] == pytest.approx(0.75**4 / 2, abs=0.01)


def test_equal_results_are_a_tie():
    scores = np.random.default_rng(0).random(50)
    found = compare(scores, scores)
    assert (found["difference"], found["low"], found["high"], found["p_better"]) == (0, 0, 0, 0.5)
    cancelling = compare(np.array([0.1, 0.3]), np.array([0.3, 0.1]))
    assert cancelling["p_better"] == pytest.approx(0.5, abs=0.02)


def test_a_clear_gain_and_no_gain_are_told_apart():
    generator = np.random.default_rng(3)
    assert compare(*pairs(generator, 500, gain=0.1))["low"] > 0
    one, other = generator.random(500) < 0.5, generator.random(500) < 0.5
    none = compare(one.astype(float), other.astype(float))
    assert none["low"] < 0 < none["high"]


def test_equal_seeds_give_equal_numbers_and_others_do_not():
    scores = pairs(np.random.default_rng(4), 300)
    assert compare(*scores) == compare(*scores)
    assert compare(*scores, seed=1) == compare(*scores, seed=1)
    first, second = np.random.default_rng(5).random((2, 300))
    assert compare(first, second, seed=1)["low"] != compare(first, second, seed=2)["low"]


def test_memory_is_bounded_where_every_difference_is_another(monkeypatch):
    first, second = np.random.default_rng(6).random((2, 1000))
    monkeypatch.setattr(module, "CHUNK", 100_000)
    tracemalloc.start()
    compare(first, second, resamples=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1_000_000  # all at once are 16 MB
