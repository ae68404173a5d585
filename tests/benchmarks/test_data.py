from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.data import cases
from benchmarks.data.__main__ import RESULT, ROOT, main, measure
from benchmarks.data.cases import Bench, Plan, all_cases
from benchmarks.data.corpus import book_words, write_copies, write_synthetic_documents
from benchmarks.data.derived import all_targets, extrapolation
from benchmarks.data.tables import render
from data_pipeline.workers import ray_session
from tests.data_pipeline.texts import prose
from trellis_dist.files import read_json

SMALL = Plan(
    bpe_bytes=300_000,
    unigram_bytes=300_000,
    stages_bytes=300_000,
    unit_bytes=65_536,
    vocab_size=600,
    synthetic=4000,
    memory_bytes=100_000,
    kills=2,
    loader_tokens=10**6,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    (root / "books").mkdir()
    for number in range(3):
        # Words that English has, so that the shipped filters let them pass.
        text = prose(number, 8000).replace("w1", "the ").replace("w2", "of ")
        (root / "books" / f"{number}.txt").write_text(
            f"header\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n{text}\n"
            "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence"
        )
    (root / "set.jsonl").write_text(json.dumps({"question": " ".join(map(str, range(20)))}) + "\n")
    (root / "work").mkdir()
    return Bench(SMALL, root / "books", root / "set.jsonl", root / "work")


def test_a_run_measures_everything_and_goes_on_where_it_stopped(
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "LANGUAGE", {})  # made-up words are of no language
    path = tmp_path / "data.json"
    with ray_session(workers=2, ray_address=None):
        assert measure(path, bench, only="encode unigram") == 1
        kept = json.loads(path.read_text())["cases"]["encode unigram"]
        for name in ("all stages", "deduplicate"):
            assert measure(path, bench, only=name) == 1
    found = json.loads(path.read_text())
    assert found["cases"]["encode unigram"] == kept
    assert not [case for case in found["cases"].values() if "error" in case]
    dedup = found["cases"]["deduplicate"]
    assert 0 <= dedup["found"]["exact"] - dedup["planted"]["exact"] <= 2  # a word replaced by itself
    assert dedup["planted"]["exact"] > 100
    assert 0.9 <= dedup["found"]["near"] / dedup["planted"]["near"] <= 1.01
    assert found["cases"]["all stages"]["steps"]["corpus"]["evaluation text"]["documents"] == 0
    assert set(found["cases"]["all stages"]["of_clean"]) >= {
        "filters",
        "language",
        "MinHash",
        "decontaminate",
    }
    assert found["extrapolation"]["core_hours"] > 0
    assert "left: encode bpe" in capsys.readouterr().out


def test_targets_have_a_verdict_once_they_are_measured() -> None:
    found: dict[str, Any] = {
        "encode bpe": {"of_ceiling": 0.9, "of_script": 0.9, "tokenise_and_shard_s": 70.0},
        "kills": {"data_sets": 3, "equal": 2},
        "memory": {"growth": 1.05},
    }
    met = {target.name: target.met for target in all_targets(found)}
    assert met["bpe: tokenise + shard, of bare encoding"] is True
    assert met["bpe: tokenise + shard, times the plain script"] is False
    assert met["unigram: tokenise + shard, of bare encoding"] is None
    assert met["data sets that differ after kills"] is False
    assert met["worker memory, ten times the input"] is True


def test_thirty_billion_tokens_are_so_many_times_the_measured_ones() -> None:
    case = {"tokens": 3 * 10**8, "whole_s": 360.0, "processes": 2, "disk_bytes": {"shards": 10**9}}
    found = extrapolation({"all stages": case | {"input_bytes": 10**9}})
    assert found["core_hours"] == pytest.approx(20.0)
    assert found["hours_by_cores"] == {"16": pytest.approx(1.25), "256": pytest.approx(0.078125)}
    assert (found["text_gb"], found["disk_gb_total"]) == (100.0, 100.0)
    assert extrapolation({}) == {}


def test_the_page_shows_what_was_measured() -> None:
    """After measuring, put the output of ``python -m benchmarks.data --show`` into the page."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert render(read_json(RESULT)).strip() in page


def test_copies_differ_in_order_only(bench: Bench, tmp_path: Path) -> None:
    words = book_words(bench.books)
    assert words[0][0] != "header"
    written = write_copies(tmp_path, words, 250_000)
    first, second = ((tmp_path / f"000{n}-00.txt").read_text().split() for n in (0, 1))
    assert first == words[0].tolist() != second
    assert sorted(first) == sorted(second)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_copies(tmp_path, words, 250_000) == written
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_synthetic_documents_have_the_copies_they_say(tmp_path: Path) -> None:
    counts = write_synthetic_documents(tmp_path, 3000, words=80, exact=0.1, near=0.1)
    texts = [
        json.loads(line)["text"] for path in tmp_path.iterdir() for line in path.read_text().splitlines()
    ]
    assert len(texts) == 3000
    assert len(texts) - len(set(texts)) == counts["exact"] > 200
    grids = np.array([text.split() for text in set(texts)], object)
    assert (np.sort((grids[:, None, :] != grids[None, :400, :]).sum(2), axis=0)[1] == 1).sum() > 20


def test_without_books_the_remedy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "--books FOLDER is needed" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no \.txt books: give a folder"):
        book_words(tmp_path)
    assert all_cases(Bench(SMALL, tmp_path, None, tmp_path))[0].name == "encode bpe"
    assert "| what | measured |" in render({"cases": {}})
