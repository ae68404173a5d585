"""The loader's benchmark on a small data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import loader


def test_it_measures_every_packing_and_removes_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PACKINGS", (("concat", 1), ("best_fit", 64)))
    found = loader.measure_loader(tmp_path, tokens=100_000, documents=200, seconds=0.02)
    assert list(tmp_path.iterdir()) == []
    assert found["dataset"]["documents"] == 200
    assert found["dataset"]["tokens"] == pytest.approx(100_000, rel=0.01)
    assert list(found["packings"]) == ["concat-1", "best_fit-64"]
    for row in [*found["packings"].values()]:
        assert row["tokens_per_second"] > 0
        first = row["first_batch_seconds"]
        assert 0 < first["without_imports"] < first["with_start_and_imports"]
    assert found["packings"]["best_fit-64"]["index_bytes"] > 0
    assert 0.9 < found["packings"]["concat-1"]["positions_that_predict"] <= 1
