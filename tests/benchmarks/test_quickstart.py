"""The quickstart's record is the run's own; the picture is drawn where matplotlib is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import quickstart
from trellis_dist.files import read_json

SUMMARY = {
    "validation/loss": 4.0,
    "validation/bits_per_byte": 2.0,
    "baseline/unigram_bits_per_byte": 3.0,
    "baseline/bigram_bits_per_byte": 2.5,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has finished, of a data set of one split."""
    monkeypatch.setattr(quickstart, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(quickstart, "PICTURE", tmp_path / "picture.png")
    split = {"documents": 3, "tokens": 40, "bytes": 90, "shards": []}
    manifest = {"fingerprint": "f" * 64, "source": {"kind": "path"}, "splits": {"train": split}}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    (run := tmp_path / "run").mkdir()
    recipe = {"training": {"validation_rows": 0}, "data": {"directory": str(tmp_path / "set")}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [{"tokens": 10**6 * n, "loss/train": 6.0 - n, "loss/validation": 6.5 - n} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_without_matplotlib_the_record_is_written_and_one_line_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    quickstart.main([str(run)])
    found = read_json(tmp_path / "result.json")
    assert found["summary"] == SUMMARY
    assert found["corpus"]["splits"] == {"train": {"documents": 3, "tokens": 40, "bytes": 90}}
    assert not (tmp_path / "picture.png").exists()
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'picture.png'} is not drawn anew: matplotlib is missing; ")
    assert line.endswith(
        f"-m pip install -c {quickstart.ROOT / 'constraints.txt'} matplotlib, and run this again"
    )
    assert "\nmatplotlib==" in (quickstart.ROOT / "constraints.txt").read_text()


def test_with_it_the_picture_is_there(run: Path, tmp_path: Path) -> None:
    quickstart.main([str(run)])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert quickstart._nats(read_json(tmp_path / "result.json"), "bigram") == 5.0


def test_a_run_without_its_numbers_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    recipe = read_json(run / "recipe.json") | {"training": {"validation_rows": 4}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"training\.validation_rows = 0"):
        quickstart.main([str(run)])
    (run / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="finish it with trellis run quickstart"):
        quickstart.main([str(run)])
    assert not (tmp_path / "result.json").exists()


def test_the_readme_has_the_numbers_of_the_record() -> None:
    found, readme = (
        read_json(quickstart.ROOT / "benchmarks/results/quickstart.json"),
        quickstart.ROOT / "README.md",
    )
    rows = dict(re.findall(r"^\| (.+?) \| \**([0-9.]+)\** \|$", readme.read_text(), re.MULTILINE))
    shown = {
        "validation/bits_per_byte": rows["**the model**"],
        "baseline/bigram_bits_per_byte": rows[
            "interpolated token bigram, counted on the same training tokens"
        ],
        "baseline/unigram_bits_per_byte": rows["unigram"],
    }
    assert shown == {name: f"{found['summary'][name]:.3f}" for name in shown}
    said = re.search(r"Python (\S+), corpus fingerprint `(\w+)`", readme.read_text())
    assert said is not None
    assert said[1] == found["versions"]["python"]
    assert said[2] == found["corpus"]["fingerprint"][:12]
