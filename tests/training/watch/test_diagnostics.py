from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trellis_dist.files import REAL, read_json
from trellis_dist.training.watch.diagnostics import diagnostics_path, dump, finite_rows, first_place, summary

NAN, INF = float("nan"), float("inf")


def tensors(**values: list[float]) -> list[dict[str, Any]]:
    return finite_rows((name.replace("__", "."), torch.tensor(value)) for name, value in values.items())


def test_pieces_of_a_parameter_make_one_row_in_the_order_of_the_model() -> None:
    pieces = [("b", torch.tensor([NAN, 1.0])), ("a", torch.tensor([5.0])), ("b", torch.tensor([INF, -2.0]))]
    assert finite_rows(pieces, names=["a", "b", "c"]) == [
        {"name": "a", "elements": 1, "nonfinite": 0, "largest": 5.0},
        {"name": "b", "elements": 4, "nonfinite": 2, "largest": 2.0},
        {"name": "c", "elements": 0, "nonfinite": 0, "largest": 0.0},
    ]


def test_the_table_says_where_numbers_are_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "diagnostics"
    weights = tensors(embedding=[1.0, -4.0], blocks__0__gate=[0.5])
    bad = tensors(embedding=[0.0, 0.0], blocks__0__gate=[NAN, INF, -3.0, 2.0])
    rows = [torch.arange(6).view(2, 3), torch.arange(3).view(1, 3)]
    history = [{"step": 8, "loss": 3.5}, {"step": 9, "loss": NAN, "norm": -INF}]
    good = tensors(embedding=[0.0, 0.0], blocks__0__gate=[0.0, 0.0, 0.0, 0.0])
    assert dump(folder, rank=0, step=9, weights=weights, gradients=good)
    assert dump(
        folder, rank=1, step=9, weights=weights, gradients=bad, history=history, tokens=rows, samples=72
    )
    table = read_json(diagnostics_path(folder, 1))
    assert (table["rank"], table["step"], table["samples"]) == (1, 9, 72)
    assert table["history"] == [{"step": 8, "loss": 3.5}, {"step": 9, "loss": "nan", "norm": "-inf"}]
    assert table["weights"][0] == {"name": "embedding", "elements": 2, "nonfinite": 0, "largest": 4.0}
    assert table["gradients"][1] == {"name": "blocks.0.gate", "elements": 4, "nonfinite": 2, "largest": 3.0}
    saved = load_file(folder / "rank-00001.safetensors")
    assert [torch.equal(saved[f"micro_batch_{i}"], part) for i, part in enumerate(rows)] == [True, True]
    assert summary(folder) == "non-finite gradient first in blocks.0.gate: 2 of 4 elements on rank 1"


def test_a_weight_that_is_not_finite_comes_before_the_gradients_it_spoils(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        weights = tensors(embedding=[1.0], head=[NAN if rank else 0.0])
        dump(tmp_path, rank=rank, step=1, weights=weights, gradients=tensors(embedding=[NAN], head=[NAN]))
    (tmp_path / "rank-00007.json").write_text("{")
    (tmp_path / "rank-00008.json").write_text("[]")
    place = first_place(tmp_path)
    assert place is not None
    assert (place.kind, place.parameter, place.ranks) == ("weight", "head", (1, 2))
    assert summary(tmp_path) == "non-finite weight first in head: 1 of 1 elements on ranks 1, 2"


def test_finite_everything_and_nothing_at_all(tmp_path: Path) -> None:
    unseen = f"all weights in {tmp_path} are finite; gradients were not looked at in the first bad step"
    assert summary(tmp_path) == unseen
    empty = [("nothing", torch.zeros(0)), ("half", torch.ones(3, dtype=torch.bfloat16))]
    assert dump(tmp_path, rank=0, step=1, weights=finite_rows(empty))
    assert summary(tmp_path) == unseen
    assert dump(tmp_path, rank=0, step=1, weights=finite_rows(empty), gradients=tensors(half=[0.0]))
    assert summary(tmp_path) == f"all weights and gradients in {tmp_path} are finite: the loss alone was not"


def test_a_full_disk_costs_a_line_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(REAL, "fsync_file", full)
    assert not dump(tmp_path, rank=3, step=1, weights=tensors(a=[NAN]))
    said = capsys.readouterr().err
    assert "from rank 3" in said
    assert "No space left on device" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert not dump(tmp_path / "file" / "below", rank=3, step=1, weights=[])
