"""The benchmark of associative recall: rows that ask what they stated, models that learn, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import recall
from trellis_dist.files import read_json

ROOT = Path(__file__).resolve().parents[2]


class Lookup(nn.Module):
    """Knows of every key the value that it was stated with, or always the next one."""

    def __init__(self, *, wrong: int = 0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, recall.KEYS + recall.VALUES)
        for row, ids in enumerate(tokens.tolist()):
            values = dict(zip(ids[::2], ids[1::2]))
            for place, key in enumerate(ids[::2]):
                wanted = recall.KEYS + (values[key] + self.wrong - recall.KEYS) % recall.VALUES
                logits[row, 2 * place, wanted] = 1.0
        return logits


@pytest.mark.parametrize("pairs", recall.PAIRS)
def test_a_row_asks_each_key_once_for_what_it_was_stated_with(pairs: int) -> None:
    tokens, labels = recall.batch(32, pairs, torch.Generator().manual_seed(1))
    assert tokens.shape == labels.shape == (32, 4 * pairs)
    for ids, asked in zip(tokens.tolist(), labels.tolist()):
        stated = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2]))
        assert len(stated) == pairs, "keys are distinct"
        assert max(stated) < recall.KEYS <= min(stated.values())
        assert dict(zip(ids[2 * pairs :: 2], ids[2 * pairs + 1 :: 2])) == stated
        expected = [stated[ids[i]] if i >= 2 * pairs and i % 2 == 0 else -100 for i in range(4 * pairs)]
        assert asked == expected
    assert any(ids[: 2 * pairs] != ids[2 * pairs :] for ids in tokens.tolist()), "in another order"


def test_accuracy_counts_the_asked_keys_alone() -> None:
    assert recall.accuracy(Lookup(), 4) == 1.0  # type: ignore[arg-type]
    assert recall.accuracy(Lookup(wrong=1), 4) == 0.0  # type: ignore[arg-type]


def test_it_trains_every_mixer_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ROWS": 4, "TEST_ROWS": 8, "PAIRS": (2,)}.items():
        monkeypatch.setattr(recall, name, value)
    recall.main(["--steps", "2", "--seeds", "0", "1", "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["steps"], found["seeds"], found["rows_per_step"]) == (2, [0, 1], 4)
    assert list(found["mixers"]) == list(recall.MIXERS)
    for mixer in found["mixers"].values():
        by_seed = [run["2"] for run in mixer["accuracy_by_seed"]]
        assert mixer["accuracy"]["2"] == pytest.approx(sum(by_seed) / 2, abs=1e-3)
    assert capsys.readouterr().out.count("accuracy at 2 pairs") == 2


def test_a_model_learns_the_rows_it_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of 4 keys and 4 values is learned in few steps."""
    for name, value in {"KEYS": 4, "VALUES": 4, "ROWS": 16, "PAIRS": (1,)}.items():
        monkeypatch.setattr(recall, name, value)
    config = recall.model_config(recall.MIXERS["corrected, tanh, silu_rms"])
    untrained, trained = (recall.accuracy(recall.train(config, seed=0, steps=n), 1) for n in (0, 20))
    assert untrained < 0.5 < 0.9 < trained


def test_the_page_has_the_numbers_of_the_result() -> None:
    found = read_json(recall.RESULT)
    mixers = list(found["mixers"].values())
    page = " ".join((ROOT / "docs" / "math.md").read_text().split())
    number = r"(\.\d\d)"
    three = f"{number} / {number} / {number}"
    told = re.search(
        rf"{three} with the default and {three} with `corrected`.* "
        rf"chance is .016, and the seeds of the latter differ by {number} at 16 pairs",
        page,
    )
    assert told is not None
    accuracies = [mixer["accuracy"][str(pairs)] for mixer in mixers for pairs in recall.PAIRS]
    first, second = (run["16"] for run in mixers[1]["accuracy_by_seed"])
    # The file has three digits of what the page has two of.
    assert [float(n) for n in told.groups()] == pytest.approx([*accuracies, first - second], abs=0.0056)
    assert f"M = 32, C = 16, {found['steps']} steps, mean of {len(found['seeds'])} seeds" in page
