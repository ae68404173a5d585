"""Prompts are cut into the cheapest batches: compared with every way to cut them."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from evals.batching import cut, cut_rows


def cost(lengths, places, *, overhead, copies):
    total = 0
    for start, stop in pairwise(places):
        batch = lengths[start:stop]
        shared = batch[0] - 1
        total += overhead + sum(shared + copies * (length - shared) for length in batch)
    return total


def every_way(lengths, *, most, spread):
    inner = range(1, len(lengths))
    for count in range(len(lengths)):
        for chosen in combinations(inner, count):
            places = [0, *chosen, len(lengths)]
            batches = [lengths[start:stop] for start, stop in pairwise(places)]
            if all(len(b) <= most(b[-1]) and b[-1] - b[0] <= spread for b in batches):
                yield places


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8).map(sorted),
    overhead=st.integers(0, 60),
    copies=st.integers(1, 4),
    rows=st.integers(1, 5),
    spread=st.integers(0, 12),
)
def test_no_way_to_cut_is_cheaper(lengths, overhead, copies, rows, spread):
    def most(length):
        return max(1, rows - length // 20)

    limits = {"most": most, "spread": spread}
    found = cut(lengths, **limits, overhead=overhead, copies=copies)
    ways = list(every_way(lengths, **limits))
    assert found in ways
    least = min(cost(lengths, places, overhead=overhead, copies=copies) for places in ways)
    assert cost(lengths, found, overhead=overhead, copies=copies) == least


def test_a_dear_start_makes_wide_batches_and_a_cheap_one_narrow_ones():
    lengths, limits = [10] * 30 + [20] * 30, {"most": lambda length: 64, "spread": 32, "copies": 3}
    assert cut(lengths, overhead=10_000, **limits) == [0, 60]
    assert cut(lengths, overhead=100, **limits) == [0, 30, 60]


def test_nothing_is_cut_into_nothing():
    assert cut([], most=lambda length: 1, spread=0, overhead=1, copies=1) == [0]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).map(sorted),
    overhead=st.integers(0, 60),
    rows=st.integers(1, 5),
    budget=st.integers(1, 100),
    spread=st.integers(0, 30),
)
def test_no_way_to_cut_rows_is_cheaper(lengths, overhead, rows, budget, spread):
    found = cut_rows(lengths, most=lambda _: rows, budget=budget, overhead=overhead, spread=spread)

    def padded(places):
        return sum(overhead + (b - a) * lengths[b - 1] for a, b in pairwise(places))

    def fits(places):
        calls = [lengths[a:b] for a, b in pairwise(places)]
        return all(
            len(c) == 1 or (len(c) <= rows and len(c) * c[-1] <= budget and c[-1] - c[0] <= spread)
            for c in calls
        )

    inner = range(1, len(lengths))
    ways = [[0, *chosen, len(lengths)] for n in range(len(lengths)) for chosen in combinations(inner, n)]
    assert fits(found)
    assert padded(found) == min(padded(places) for places in ways if fits(places))
