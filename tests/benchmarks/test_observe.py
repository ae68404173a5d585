"""What watching costs: the arithmetic, one quick round, and the page's table."""

from __future__ import annotations

import math

import pytest

from benchmarks import observe
from trellis_dist.files import read_json


def test_the_cost_is_a_tenth_of_a_row_and_a_hundredth_of_a_look():
    rounds = [
        {"off": (10.0, 5.0), "rows": (10.1, 5.05), "looks": (11.1, 5.15)},
        {"off": (10.0, 5.0), "rows": (10.3, 5.05), "looks": (11.3, 5.15)},
        {"off": (10.0, 5.0), "rows": (10.2, 5.05), "looks": (10.7, 5.15)},
    ]
    found = observe.summary(rounds)
    assert found["wall"]["step_seconds"] == 1.0
    assert found["wall"]["rows"]["median"] == pytest.approx(0.02)
    assert found["wall"]["looks"]["median"] == pytest.approx(0.01)
    assert found["cost"]["wall"] == pytest.approx(0.03)
    assert found["cost"]["cpu"] == pytest.approx(0.01 + 0.1 / 100 / 0.5)


def test_a_round_writes_rows_and_looks_where_it_should(monkeypatch: pytest.MonkeyPatch):
    small = {"shape": (1, 16, 2, 64), "slots": 4, "rows": 1}
    monkeypatch.setitem(observe.MODELS, "small", {**small, "rounds": 1})
    monkeypatch.setattr(observe, "BLOCK", 2)
    found = observe.measure("small", rounds=2)
    assert [set(round_) for round_ in found["blocks"]] == [set(observe.KINDS)] * 2
    assert all(math.isfinite(found["cost"][clock]) for clock in ("wall", "cpu"))
    assert found["wall"]["step_seconds"] > 0


def test_the_page_has_the_table_of_the_result():
    page = observe.PAGE.read_text(encoding="utf-8")
    measured = observe.RESULT.is_file()  # without a result the page says no number
    assert page.endswith(observe.section(read_json(observe.RESULT)) if measured else observe.HEADING)
