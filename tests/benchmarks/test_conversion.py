"""The benchmark of conversion trains and scores both starts, and the page has its numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import conversion
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import read_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b.txt", conversion.HELD_OUT)):
        lines = (
            f"{number} times {k} is {number * k}, as every {k % 7}th reader knows.\n" for k in range(900)
        )
        (folder / name).write_text("".join(lines))
    return folder


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"VOCABULARY": 320, "LENGTH": 16, "ROWS": 2, "HELD_OUT_ROWS": 4}.items():
        monkeypatch.setattr(conversion, name, value)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    monkeypatch.setattr(conversion, "LLAMA", {**conversion.LLAMA, **sizes})
    monkeypatch.setattr(conversion, "TRELLIS", {"slots": 4, "chunk_size": 4})


@pytest.mark.usefixtures("_small")
def test_it_compares_both_starts_and_goes_on_where_it_stopped(books: Path, tmp_path: Path) -> None:
    output, work = tmp_path / "out.json", tmp_path / "work"
    arguments = ["--books", str(books), "--work", str(work), "--output", str(output)]
    arguments += ["--llama-steps", "30", "--steps", "8", "--seeds", "0", "1"]
    conversion.main(arguments)
    found = read_json(output)
    assert found["scored"] == [0, 1, 2, 4, 8]
    for start in conversion.STARTS:
        for run in found["runs"][start].values():
            assert all(math.isfinite(bits) for bits in run["bits_per_byte"].values())
    bits = found["summary"]["bits_per_byte"]
    assert bits["converted"]["0"] < bits["scratch"]["0"], "a trained embedding is worth something at once"
    taken = {start: found["runs"][start]["0"]["tensors taken over, fresh"] for start in conversion.STARTS}
    assert taken["scratch"][0] == 0
    assert taken["converted"][0] - taken[conversion.PARTLY][0] == 4, "q, k, v and out of the one layer"
    assert len({sum(counts) for counts in taken.values()}) == 1
    (work / "converted-1-8.json").unlink()
    conversion.main(arguments)
    assert read_json(output)["runs"] == found["runs"], "the missing run again, to the same numbers"


@pytest.mark.usefixtures("_small")
def test_bits_per_byte_of_a_model_that_knows_nothing(books: Path, tmp_path: Path) -> None:
    text = conversion.Text(books, tmp_path)

    class Uniform(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> object:
            return type("Output", (), {"logits": torch.zeros(*tokens.shape, 320)})

    decoded = Tokenizer.load(tmp_path / "tokenizer.model").decode(text.held_out[:, 1:].flatten().tolist())
    expected = 4 * 16 * math.log2(320) / len(decoded.encode())
    assert conversion.bits_per_byte(Uniform(), text) == pytest.approx(expected, rel=1e-6)
    assert decoded[:40] in (books / conversion.HELD_OUT).read_text()


def test_the_summary_counts_wins_and_the_step_that_catches_up() -> None:
    def run(*bits: float) -> dict[str, object]:
        return {"bits_per_byte": dict(zip(("0", "2", "4"), bits, strict=True))}

    runs = {
        "scratch": {"0": run(4.0, 3.0, 2.5), "1": run(4.2, 3.2, 2.7)},
        "converted": {"0": run(3.0, 2.6, 2.4), "1": run(3.2, 2.6, 2.8)},
    }
    runs[conversion.PARTLY] = runs["scratch"]
    found = conversion.summary(runs, [0, 2, 4])
    assert found["bits_per_byte"]["scratch"] == {"0": 4.1, "2": 3.1, "4": 2.6}
    assert (found["steps_to_scratch"], found["wins"]) == (2, 1)
    assert conversion.summary({**runs, "converted": runs["scratch"]}, [0, 2, 4])["steps_to_scratch"] == 4
    shown = conversion.table({"scored": [0, 2, 4], "tokens_per_step": 1000, "summary": found})
    assert shown.splitlines()[0].endswith("| 0k | 2k | 4k |")
    assert "| converted | 3.100 | 2.600 | 2.600 |" in shown


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [conversion.learning_rate(number, 100) for number in range(1, 101)]
    assert rates[conversion.WARMUP - 1] == max(rates) == conversion.PEAK
    assert rates[-1] == pytest.approx(conversion.PEAK / 10)
    assert rates[0] == pytest.approx(conversion.PEAK / conversion.WARMUP)


def test_the_page_has_the_numbers_of_the_result() -> None:
    found = read_json(conversion.RESULT)
    page = (ROOT / "docs" / "export.md").read_text()
    assert conversion.table(found) in page
    assert len(found["runs"]["scratch"]) >= 3
    assert found["summary"]["wins"] == len(found["runs"]["scratch"]), "converted is ahead for every seed"
    reached = found["summary"]["steps_to_scratch"] * found["tokens_per_step"]
    assert f"after {reached:,} tokens" in page
    partly = found["summary"]["bits_per_byte"][conversion.PARTLY][str(found["scored"][-1])]
    assert f"{partly:.3f} without the mixers' projections" in page
    assert f"{found['llama']['bits_per_byte']:.3f} bits per byte" in page
    assert f"{found['llama']['steps'] * found['tokens_per_step']:,} tokens" in page
    assert found["versions"]["torch"] in page
