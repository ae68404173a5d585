"""The benchmark of saving and loading measures every case, here on a small model."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from benchmarks import checkpoint, checkpoint_ranks
from checkpoints.state import verify_checkpoint
from trellis_dist.files import read_json
from trellis_dist.models.config import ModelConfig, TrellisConfig

SMALL = ModelConfig(
    vocab_size=64, num_layers=1, dim=16, num_heads=2, trellis=TrellisConfig(slots=4, chunk_size=8)
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> checkpoint.Bench:
    for name, value in {"ROUNDS": 2, "LOOP_STEPS": 3, "LOOP_ROUNDS": 2}.items():
        monkeypatch.setattr(checkpoint, name, value)
    monkeypatch.setattr(os, "sync", lambda: None)  # other tests write meanwhile
    monkeypatch.setattr(checkpoint_ranks, "LENGTH", 16)
    monkeypatch.setattr(checkpoint, "OTHER_MESHES", ["tp 2"])
    (tmp_path / "work").mkdir()
    return checkpoint.Bench(SMALL, tmp_path / "work")


def test_it_measures_every_case_and_goes_on_where_it_stopped(
    bench: checkpoint.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measured = tmp_path / "out.json", []
    real = checkpoint.save_case
    monkeypatch.setattr(checkpoint, "save_case", lambda given: measured.append(1) or real(given))
    assert checkpoint.measure(bench, output, only="save") == 1, "the others are left"
    assert not output.exists()
    assert checkpoint.measure(bench, output) == 0
    assert measured == [1]
    cases = read_json(output)["cases"]
    parameters = sum(p.numel() for p in bench.engine.forward_module.parameters())
    assert cases["save"]["bytes"] == 4 * 3 * parameters, "weights and two moments, in fp32"
    assert cases["background"]["snapshot_bytes"] == cases["save"]["bytes"]
    assert len(cases["save"]["rounds"]["plain"]) == 2
    plain, save = (statistics.median(cases["save"]["rounds"][name]) for name in ("plain", "save"))
    assert cases["save"]["bandwidth_of_plain"] == round(plain / save, 3)
    assert checkpoint.table(read_json(output)).count("\n") > 10
    assert verify_checkpoint(bench.kept()) == [], "a save without hashes must leave nothing behind"
    assert sorted(path.name for path in bench.work.iterdir()) == ["checkpoint.json", "kept"]


def test_plain_writes_have_the_bytes_of_a_save(bench: checkpoint.Bench) -> None:
    assert sum(len(piece) for piece in bench.pieces()) == bench.size
    assert bench.size > 0


def test_the_page_has_the_numbers_of_the_result() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text()
    inside = page.split("<!-- checkpoint table -->\n")[1].split("\n<!-- end -->")[0]
    assert inside == checkpoint.table(read_json(checkpoint.RESULT))
