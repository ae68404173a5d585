"""The decode benchmark: both kinds, what was read and what was not, a table of every case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from trellis_dist.files import read_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = decode.model_config

    def narrow(kind: str):
        return replace(wide(kind), num_layers=1, dim=64, num_heads=2, vocab_size=64)

    monkeypatch.setattr(decode, "model_config", narrow)


def test_every_case_is_measured_and_unread_prompts_are_said(small: None, tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    decode.main(
        ["--lengths", "64", "128", "--batches", "1", "2", "--read-limit", "128", "--output", str(path)]
    )
    rows = read_json(path)["rows"]
    assert [(r["length"], r["batch"], r["kind"]) for r in rows] == [
        (length, batch, kind) for length in (64, 128) for batch in (1, 2) for kind in decode.KINDS
    ]
    read = {(r["length"], r["batch"]): r["first_token_s"] is not None for r in rows}
    assert read == {(64, 1): True, (64, 2): True, (128, 1): True, (128, 2): False}
    sizes = {(r["length"], r["batch"], r["kind"]): r["state_bytes"] for r in rows}
    assert sizes[64, 1, "trellis"] == sizes[128, 1, "trellis"] == sizes[128, 2, "trellis"] / 2
    steps = decode.WARMUP + decode.STEPS
    assert sizes[128, 2, "attention"] == 2 * 2 * (128 + steps) * 64 * 4  # rows, keys and values, fp32
    assert "| 128 | 2 |" in decode.render(read_json(path))


def test_a_copied_state_goes_on_as_the_row_it_was_copied_from(small: None) -> None:
    model = decode.build("trellis", torch.device("cpu"))
    one = decode.read_on(model, model.init_state(1), 96, torch.device("cpu"))
    two = decode.state_after(model, 96, batch=2, before=one)
    token = torch.tensor([5])
    alone, _ = model.decode_step(token, one)
    both, _ = model.decode_step(token.repeat(2), two)
    torch.testing.assert_close(both, alone.repeat(2, 1))


def test_a_cache_beyond_the_memory_is_said(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MEMORY_SHARE", 0.0)
    device = torch.device("cpu")
    models = {kind: decode.build(kind, device) for kind in decode.KINDS}
    rows = decode.measure_lengths(
        models, lengths=[64], batches=[1], limits=dict.fromkeys(decode.KINDS, 0), device=device
    )
    assert rows[1]["state"] == "does not fit this machine"
    assert "state_bytes" in rows[0]


def test_the_page_has_the_table_of_the_result() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    inside = page.split("<!-- decode table -->\n")[1].split("\n<!-- end -->")[0]
    assert inside == decode.render(read_json(decode.RESULT))
