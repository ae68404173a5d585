"""The evaluation benchmark: tokens counted right, three ways that agree, a peak that a child measures."""

from __future__ import annotations

import json
import mmap
import random
from pathlib import Path

import pytest

from benchmarks import evals as bench
from trellis_dist.files import read_json


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty PIQA rows of made-up words."""
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"{draw.choice('bdgklmnprst')}{draw.choice('aeiou')}" * 2 for _ in range(count))

    lines = [{"goal": words(9), "sol1": words(4), "sol2": words(6), "label": 0} for _ in range(30)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "VOCABULARY", 320)
    monkeypatch.setattr(bench, "CHOICE_SUITES", ("piqa",))


def test_three_ways_score_the_same_and_sharing_reads_less(small: None, rows: Path, tmp_path: Path) -> None:
    found = bench.measure(rows, tmp_path / "work", limit=4, rounds=1, lengths=[])
    row = found["choices"]["piqa"]
    assert (row["questions"], row["requests"]) == (4, 8)
    assert row["largest_difference"]["apart"] < 1e-4
    assert row["largest_difference"]["harness"] < 1e-3
    questions = bench.read_suites(rows, 4)["piqa"]
    encode = bench.Tokenizer.load(tmp_path / "work" / "tokenizer.model").encode
    prompts = [1 + len(encode(q.requests[0][0])) for q in questions]
    choices = sum(len(encode(after)) for q in questions for _, after in q.requests)
    assert row["tokens"] == {"shared": sum(prompts) + choices, "apart": 2 * sum(prompts) + choices}
    assert "| piqa | 4 |" in bench.render(found)


def test_a_child_measures_its_own_peak_above_the_loaded_model(tmp_path: Path) -> None:
    """32 MiB that are touched and freed after the model is loaded are in the peak, whatever was before."""
    before = bench._status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with mmap.mmap(-1, 32 * 2**20) as held:  # new pages, whatever the allocator has kept
        for place in range(0, len(held), 4096):
            held[place] = 1
    assert 30 <= bench._status("VmHWM") - before <= 64


def test_the_page_has_the_tables_of_the_result() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    inside = page.split("<!-- evals table -->\n")[1].split("\n<!-- end -->")[0]
    found = read_json(bench.RESULT)
    assert inside == bench.render(found)
    peaks = [row["peak_above_mib"] for row in found["needles"]]
    assert found["needles"][-1]["prompt_tokens"] > 7 * found["needles"][0]["prompt_tokens"]
    assert peaks[-1] <= 1.05 * peaks[0]
