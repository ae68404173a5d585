"""Profiles: the passes by name in a trace per rank, the numbers untouched, a failed write survived."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.training import profiling
from trellis_dist.training.config import ProfileConfig
from trellis_dist.training.loop import run
from trellis_dist.training.profiling import Profiler, profile_folder

PASSES = {"forward": 4, "backward": 4, "reduction of the gradients": 2, "update of the weights": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def profiled(data: Path, **changes: object):
    profile = ProfileConfig(enabled=True, **{"start_step": 3, "steps": 2, **changes})
    return make_job(data, logging={"profile": profile}, training={"steps": 6})


def passes(trace: Path) -> dict[str, int]:
    """How often each pass is in a trace."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in PASSES}


def test_a_profile_shows_the_passes_and_changes_no_number(data: Path, tmp_path: Path, capsys) -> None:
    run(make_job(data, training={"steps": 6}), tmp_path / "plain")
    run(profiled(data, shapes=True, memory=True), tmp_path / "profiled")
    folder = profile_folder(tmp_path / "profiled", 3)
    assert passes(folder / "rank-00000.trace.json.gz") == PASSES  # of two steps of two micro-batches
    top = json.loads((folder / "rank-00000.operators.json").read_text())
    assert {"forward", "backward"} <= {row["name"] for row in top}
    assert all(row["calls"] > 0 for row in top)
    assert "Self CPU" in (folder / "rank-00000.operators.txt").read_text()
    assert exact_rows(tmp_path / "profiled") == exact_rows(tmp_path / "plain")
    assert state(tmp_path / "profiled", 6) == state(tmp_path / "plain", 6)
    assert f"profile: {folder}; open" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank-00000.operators.json",
        "rank-00000.operators.txt",
        "rank-00000.trace.json.gz",
    ]


def test_a_trace_that_cannot_be_written_is_an_alert(data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "profile").write_text("in the way")
    assert run(profiled(data), tmp_path).outcome == "finished"
    assert "alert: the profile of rank 0 could not be written: " in capsys.readouterr().err


def test_a_trace_too_large_to_be_looked_at_is_dropped_and_the_table_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(profiling, "LARGEST", 100)
    run(profiled(data), tmp_path)
    assert "and is not kept: profile fewer logging.profile.steps" in capsys.readouterr().err
    names = sorted(path.name for path in profile_folder(tmp_path, 3).iterdir())
    assert names == ["rank-00000.operators.json", "rank-00000.operators.txt"]


def test_a_start_past_the_first_step_profiles_its_own_third(data: Path, tmp_path: Path) -> None:
    run(make_job(data, training={"steps": 6}), tmp_path, stop_at_step=3)
    run(profiled(data, start_step=2, steps=9), tmp_path)  # the run ends before they are done
    folder = profile_folder(tmp_path, 6)
    assert passes(folder / "rank-00000.trace.json.gz") == {name: n // 2 for name, n in PASSES.items()}


def test_a_start_that_ends_too_early_says_that_nothing_was_profiled(tmp_path: Path) -> None:
    said: list[str] = []
    config = ProfileConfig(enabled=True, start_step=10)
    profiler = Profiler(config, tmp_path, rank=0, resumed_step=0, say=said.append)
    profiler.before_step(1)
    profiler.after_step(1)
    profiler.close()
    profiler.close()
    assert said == ["alert: nothing was profiled: this start ended before step 10"]


@pytest.mark.parametrize("enabled, ranks", [(False, ()), (True, (1, 2))])
def test_other_ranks_and_runs_profile_nothing(tmp_path: Path, enabled: bool, ranks: tuple[int, ...]) -> None:
    config = ProfileConfig(enabled=enabled, start_step=2, ranks=ranks)
    profiler = Profiler(config, tmp_path, rank=0, resumed_step=0, say=pytest.fail)
    for step in range(1, 9):
        profiler.before_step(step)
        profiler.after_step(step)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"start_step": 1}, {"steps": 0}, {"steps": 101}, {"ranks": (-1,)}])
def test_what_cannot_be_profiled_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"logging\.profile\.{next(iter(wrong))} = .*: use "):
        ProfileConfig(**wrong)
