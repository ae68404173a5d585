"""What watching costs: the arithmetic, one quick round, and the page's table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import observe
from tests.distributed import gloo_pool
from trellis_dist.files import read_json
from trellis_dist.training.metrics import read_rows

SMALL: dict[str, Any] = {"shape": (1, 16, 2, 64), "slots": 4, "rows": 1, "ranks": 1}


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
    monkeypatch.setitem(observe.MODELS, "small", {**SMALL, "rounds": 1})
    monkeypatch.setattr(observe, "BLOCK", 2)
    found = observe.measure("small", rounds=2)
    assert [set(round_) for round_ in found["blocks"]] == [set(observe.KINDS)] * 2
    assert all(math.isfinite(found["cost"][clock]) for clock in ("wall", "cpu"))
    assert found["wall"]["step_seconds"] > 0


def test_two_ranks_take_the_same_blocks(tmp_path: Path):
    job = observe.make_job(tmp_path / "set", **{**SMALL, "rows": 2, "ranks": 2})
    first, second = gloo_pool(2).run(observe.take, job, tmp_path / "run", 1)
    assert first == second  # means over both
    assert [set(round_) for round_ in first] == [set(observe.KINDS)]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    looked = [row for row in rows if "optim/update_to_weight" in row]
    assert (len(rows), len(looked)) == (4, 2)  # with those of the warm-up
    assert all("perf/communication_share" in row for row in rows)


def test_the_page_has_the_table_of_the_result():
    page = observe.PAGE.read_text(encoding="utf-8")
    measured = observe.RESULT.is_file()  # without a result the page says no number
    assert page.endswith(observe.section(read_json(observe.RESULT)) if measured else observe.HEADING)
