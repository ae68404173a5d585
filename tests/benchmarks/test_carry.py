"""The benchmark of carried states runs, and the page has its numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import carry
from tests.data_pipeline.written import documents, write_dataset
from trellis_dist.files import read_json

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_both_beyond_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 2, "LENGTH": 32, "RUNS": (1, 4), "WINDOW": 96, "WINDOWS": 2}.items():
        monkeypatch.setattr(carry, name, value)
    monkeypatch.setattr(carry, "SPANS", ((0, 32), (32, 96)))
    long = [[1, *range(3, 400), 2] for _ in range(8)]
    data = write_dataset(
        tmp_path, {"train": {"corpus": [[*long, *documents(0, 40)]]}, "validation": {"corpus": [long[:1]]}}
    )
    times = carry.step_times(data, 20)
    assert times["rounds"] == 15
    assert all(low <= middle <= high for low, middle, high in (*times["ms"].values(), times["ratio"]))
    found = {
        f"carry_rows {rows}": carry.measure(data, carry_rows=rows, seeds=[0], steps=4) for rows in carry.RUNS
    }
    assert all(math.isfinite(nats) for result in found.values() for nats in result["nats"].values())
    assert found["carry_rows 1"]["nats"] != found["carry_rows 4"]["nats"]
    assert "| `carry_rows = 4` |" in carry.table({"trained": found})


def test_the_page_has_the_numbers_of_the_result() -> None:
    found = read_json(carry.RESULT)
    page = (ROOT / "docs" / "data.md").read_text()
    assert carry.table(found) in page
    assert f"{found['step']['ratio'][1]:.2f} times as long" in page
