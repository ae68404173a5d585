"""RUN/training.html: what it says of runs that finished, failed and never began; large ones stay small."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch import training_run
from launch.aftermath import record_failed_start, reported, summed_up
from launch.cli import main
from launch.failures import RankError, read_failures, record_failure
from launch.recipe import load_recipe, resolve
from launch.run_report import POINTS, write_training_report
from trellis_dist.training.console import append_event
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.starts import Starts

BASE = str(Path(__file__).with_name("base.toml"))
HOSTILE = '<script>alert("x")</script>'


def recipe(*overrides: str) -> Any:
    return load_recipe(BASE, list(overrides))


def write_run(folder: Path, rows: int = 40) -> Path:
    """A run of 240 steps that died at step ``rows`` once and then got on."""
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(resolve(recipe("optimizer.lr=0.125"))))
    now = [1.7e9]
    for number, (first, last, outcome) in enumerate([(0, rows, ""), (rows // 2, rows, "stopped")]):
        starts = Starts(folder, main=True, resumed_step=first, world_size=2, clock=lambda: now[0])
        for step in range(first + 1, last + 1):
            now[0] += 1.0
            starts.note(step, 1.0)
        if outcome:
            starts.end(outcome)
        starts.close()
        now[0] += 60.0
        assert starts.restarts == number
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            file.write(json.dumps(row(step)) + "\n")
    return folder


def row(step: int) -> dict[str, Any]:
    made = {"step": step, "loss/train": 9.0 if step == 17 else 3.0 + math.sin(step) / 9, "perf/mfu": 0.4}
    made |= {"optim/gradient_norm": None, "perf/goodput": 0.5, "memory/peak_bytes": 2**30}
    made |= {f"trellis/layer_{layer:02d}/memory_norm": layer + 1.0 for layer in range(9)}
    return made | ({"loss/validation": 3.5, "loss/position_0000_0063": 4.0} if step % 20 == 0 else {})


class Page(HTMLParser):
    """The text of a page, its links and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.links, self.loaded, self.titles = "", [], [], []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [found["href"]] if tag == "a" else []
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe") else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_the_numbers_the_curves_the_starts_and_the_recipe(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    append_event(folder / "console.jsonl", "start", "recipe base\n  model  dim=1\nmesh: dp 2 on cpu")
    append_event(folder / "console.jsonl", "alert", f"alert: {HOSTILE}")
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    assert main(["report", str(folder)]) == 0
    page = Page(folder / "training.html")
    assert page.loaded == []
    assert "default-src 'none'" in page.source.replace("&#x27;", "'")
    assert HOSTILE not in page.source
    assert HOSTILE in page.text
    for words in ("40 of 240", "327,680", "Best validation loss", "Restarts", "crashed or killed", "stopped"):
        assert words in page.text
    for title in (
        "Loss",
        "MFU",
        "Most memory of a rank",
        "Goodput",
        "memory norm, 6 of 9",
        "Validation loss by position",
    ):
        assert f"<figcaption>{title}</figcaption>" in page.source
    assert "<figcaption>Gradient norm" not in page.source  # none was finite
    assert "mesh: dp 2 on cpu" in page.text
    assert re.search(r"optimizer\.lr.{0,60}0\.125.{0,60}0\.003", page.source)


def test_a_failed_start_is_told_with_its_error_and_its_records_are_linked(tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "run")
    for name in (
        "profile/step-00000003/rank-00000.trace.json.gz",
        "logs/flight-step-00000007/rank-00001.json",
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
    (folder / "profile/step-00000003/rank-00000.operators.json").write_text('[{"name": "another version"}]')
    error = "rank 1 on node-2: no progress"
    with pytest.raises(RankError), summed_up(recipe(), folder):
        reported(lambda: fail(error), folder)()
    page = Page(folder / "training.html")
    assert "Start 2 failed" in page.text
    assert page.text.count(error) == 2  # at the top, and at its start
    assert "profile/step-00000003/rank-00000.trace.json.gz" in page.links
    assert "logs/flight-step-00000007/rank-00001.json" in page.links
    said = capsys.readouterr().err
    assert said.startswith("failed: step 40 of 240, 327,680 tokens\n")
    assert "next: do what the error says; no step is saved" in said
    events = read_rows(folder / "console.jsonl")
    assert [(event["kind"], event["text"]) for event in events] == [("failure", error)]


def test_the_rank_of_torchrun_that_says_the_cause_sums_the_run_up(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = write_run(tmp_path / "run")
    for rank, echo in ((0, True), (1, False)):
        record_failure(folder, rank=rank, message="a word", detail="", echo=echo)
    monkeypatch.setattr(training_run, "ECHO_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for failure in read_failures(folder):
        training_run._tell_once(failure, folder, recipe())
    said = capsys.readouterr().err
    assert said.startswith("failed: step 40 of 240, 327,680 tokens\n")
    assert [said.count(words) for words in ("failed: step", "trellis: error: rank 1 on ")] == [1, 1]
    assert "a word" in Page(folder / "training.html").text


def fail(error: str) -> None:
    raise RankError(error, "its traceback")


def test_a_run_that_never_began_has_a_page_and_no_summary(tmp_path: Path, capsys) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(resolve(recipe())))
    with pytest.raises(RankError), summed_up(recipe(), tmp_path):
        reported(lambda: fail("no such data"), tmp_path)()
    assert capsys.readouterr().err == ""
    page = Page(tmp_path / "training.html")
    assert "No row of metrics" in page.text
    assert "no such data" in page.text


def test_a_page_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys) -> None:
    record_failed_start(tmp_path / "absent", "the error")
    assert "no recipe.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows=20_000)
    page = Page(write_training_report(folder))
    assert len(page.source) < 1_000_000
    assert f"20,000 rows; of each curve at most {POINTS:,} points are drawn" in page.text
    loss = re.search(r"Loss</figcaption>.*?points=\"([^\"]+)\"", page.source, re.DOTALL)
    drawn = [tuple(map(float, point.split(","))) for point in loss[1].split()]
    assert len(drawn) <= POINTS
    heights = sorted(y for _, y in drawn)
    assert heights[0] < 50 < 200 < heights[1]  # the loss of step 17, high above all others
