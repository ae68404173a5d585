"""Retention against recall: found where it is planted, not found where it is not, said where it cannot be."""

import dataclasses

import numpy as np
import pytest

from evals.figures.retention import Items, accuracy, against_recall


def items(retention, right, groups, chance=10.0):
    """``retention`` [N, H] as that of one layer; a second layer keeps everything."""
    both = np.stack([retention, np.zeros_like(retention)], 1)[:, :, None]
    return Items(
        (0, 3), ("keys",), both, np.asarray(right, float), tuple(groups), dict.fromkeys(groups, chance)
    )


def drawn(*, slope=0.0, heads=2, count=120, seed=0):
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.6
    kept = -1.0 + 0.3 * rng.normal(size=(count, heads))
    kept[:, -1] += slope * right
    return items(kept, right, ["512"] * count)


def test_a_head_that_keeps_what_is_recalled_is_found():
    found = against_recall(drawn(slope=0.5))
    by_head = {(one["layer"], one["head"]): one for one in found["heads"]}
    assert set(by_head) == {(0, 0), (0, 1)}  # the second layer forgets nothing: there is nothing to correlate
    assert found["looked_at"] == 2
    assert by_head[0, 1]["r"] > 0.4
    assert by_head[0, 1]["p"] < 0.001
    assert by_head[0, 0]["p"] > 0.05
    (layer,) = found["layers"]
    shares = [part["percent"] for part in layer["parts"]]
    assert [part["items"] for part in layer["parts"]] == [30] * 4
    assert shares[0] < 45 < 75 < shares[-1]
    retained = [part["retention"] for part in layer["parts"]]
    assert retained == sorted(retained)


def test_of_many_heads_the_best_is_found_by_chance_no_oftener_than_p_says():
    alone, among_all = 0, 0
    for seed in range(20):
        heads = against_recall(drawn(heads=40, seed=seed))["heads"]
        alone += any(not one["low"] <= 0 <= one["high"] for one in heads)
        among_all += min(one["p"] for one in heads) < 0.05
    assert alone > 13  # what an interval of each head by itself would have told
    assert among_all <= 4


def test_what_lengths_differ_in_is_no_correlation():
    rng = np.random.default_rng(0)
    groups = ["512"] * 80 + ["1024"] * 80
    right = np.concatenate([rng.random(80) < 0.9, rng.random(80) < 0.4])
    kept = np.repeat([-0.1, -2.0], 80)[:, None] + 0.01 * rng.normal(size=(160, 1))
    assert np.corrcoef(kept[:, 0], right)[0, 1] > 0.4
    found = against_recall(items(kept, right, groups))
    assert found["heads"][0]["p"] > 0.05
    assert np.ptp([part["percent"] for part in found["layers"][0]["parts"]]) < 25


def test_a_length_at_chance_is_left_out_and_said():
    found = drawn(slope=0.5)
    right = found.right.copy()
    groups = ("512",) * 60 + ("1024",) * 60
    right[60:] = np.arange(60) % 10 == 0
    found = dataclasses.replace(found, right=right, groups=groups, chance={"512": 10.0, "1024": 10.0})
    told = against_recall(found)
    assert told["groups"] == ["512"]
    assert sum(part["items"] for part in told["layers"][0]["parts"]) == 60
    right = np.tile(np.arange(60) % 10 == 0, 2).astype(float)
    nothing = against_recall(dataclasses.replace(found, right=right))
    assert nothing["reason"] == "accuracy is nowhere above chance"
    assert nothing["heads"] == nothing["layers"] == []
    (first, _) = accuracy(found)
    assert first["low"] > first["chance"] == 10.0


def test_too_few_that_differ_say_nothing():
    kept = np.linspace(-1, 0, 40)[:, None]
    right = np.ones(40)
    right[:9] = 0
    assert "fewer than 10 items" in against_recall(items(kept, right, ["512"] * 40))["reason"]
    right[9] = 0
    assert against_recall(items(kept, right, ["512"] * 40))["heads"][0]["r"] == pytest.approx(0.75, abs=0.02)


def test_a_model_that_forgets_nothing_has_no_correlation():
    right = np.arange(60) % 3 > 0
    found = against_recall(items(np.zeros((60, 2)), right, ["512"] * 60))
    assert (found["reason"], found["looked_at"], found["layers"]) == ("", 0, [])
