"""Profiles: the passes by name in a trace per rank, the numbers untouched, a failed write survived."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from tests.training.small_run import exact_rows, make_job, state, write_dataset
from trellis_dist.training import profiling
from trellis_dist.training.config import ProfileConfig
from trellis_dist.training.loop import run
from trellis_dist.training.profiling import Profiler, profile_folder
from trellis_dist.training.watch.hang import HangWatch

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


def test_other_ranks_wait_for_the_writing_under_the_long_limit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[tuple[float, str]] = []
    arm = HangWatch.arm

    def note(watch: HangWatch, seconds: float, *, step: int, operation: str) -> None:
        armed.append((seconds, operation))
        arm(watch, seconds, step=step, operation=operation)

    monkeypatch.setattr(HangWatch, "arm", note)
    job = profiled(data, ranks=(1,))  # not this one
    run(job, tmp_path, stop_at_step=5)
    where = armed.index((job.training.first_step_timeout_s, "writing the profile"))
    before = [operation for _, operation in armed[:where]]
    assert before.count("reading rows") == 4
    assert armed[where + 1] == (job.training.step_timeout_s, "measuring")


def test_a_run_that_fails_leaves_no_profile_and_no_profiler(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiling_at_the_error: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        profiling_at_the_error.append(torch._C._autograd._profiler_enabled())
        raise ValueError("at step 3")

    started = profiling.Profiler.after_step
    monkeypatch.setattr(
        profiling.Profiler, "after_step", lambda self, step: fail() if step == 3 else started(self, step)
    )
    with pytest.raises(ValueError, match="at step 3"):
        run(profiled(data), tmp_path)
    assert profiling_at_the_error == [True]
    assert not torch._C._autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()


class Recording:
    """Stands in for torch's profiler."""

    def __init__(self) -> None:
        self.stopped = 0

    def start(self) -> None: ...

    def step(self) -> None:
        raise RuntimeError("no more memory")

    def stop(self) -> None:
        self.stopped += 1
        raise RuntimeError("not in this state")


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> tuple[Profiler, Recording]:
    recording = Recording()
    monkeypatch.setattr(Profiler, "_made", lambda self: recording)
    config = ProfileConfig(enabled=True, start_step=3)
    profiler = Profiler(config, tmp_path, rank=0, resumed_step=0, say=said.append)
    profiler.before_step(2)
    return profiler, recording


def test_a_profile_that_cannot_go_on_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    profiler, recording = begun(tmp_path, monkeypatch, said)
    profiler.after_step(2)
    assert said == ["alert: the profile of rank 0 could not go on: no more memory"]
    assert recording.stopped == 1
    profiler.close()
    assert recording.stopped == 1


def test_a_rollback_inside_the_profiled_steps_ends_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    profiler, recording = begun(tmp_path, monkeypatch, said)
    monkeypatch.setattr(recording, "step", lambda: None)
    profiler.after_step(2)
    profiler.after_step(3)
    profiler.before_step(2)
    profiler.after_step(2)
    assert said == ["alert: the profile of rank 0 could not go on: step 3 was rolled back"]
    assert recording.stopped == 1
    profiler.before_step(3)
    assert profiler.writes_after(5)  # as on the other ranks
    profiler.after_step(5)


def test_a_run_that_fails_with_sends_under_way_does_not_stop_the_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler, recording = begun(tmp_path, monkeypatch, [])
    monkeypatch.setattr(profiling, "sends_under_way", lambda: True)
    profiler.close(failed=True)
    assert recording.stopped == 0


def test_a_device_that_does_not_end_its_work_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(profiling, "STOP_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: release.wait(60))
    profiler, recording = begun(tmp_path, monkeypatch, [])
    profiler.close(failed=True)
    assert recording.stopped == 0
    release.set()
    monkeypatch.setattr(profiling, "STOP_S", 60.0)
    profiler, recording = begun(tmp_path, monkeypatch, [])
    profiler.close(failed=True)
    assert recording.stopped == 1


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


@pytest.mark.parametrize("wrong", [{"start_step": 1}, {"steps": 0}, {"steps": 21}, {"ranks": (-1,)}])
def test_what_cannot_be_profiled_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"logging\.profile\.{next(iter(wrong))} = .*: use "):
        ProfileConfig(**wrong)
