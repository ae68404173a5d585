"""Starts: what was done twice, and what share of the time was of use, through kills and other machines."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.small_run import make_job, write_dataset
from trellis_dist.training import loop
from trellis_dist.training.closing import close_run
from trellis_dist.training.loop import run
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.starts import LINE, Starts, read_starts, useful_seconds


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def begin(folder: Path, clock: Clock, *, resumed: int = 0, main: bool = True) -> Starts:
    return Starts(folder, main=main, resumed_step=resumed, world_size=2, clock=clock)


def steps(starts: Starts, clock: Clock, *numbers: int, seconds: float = 2.0) -> None:
    for step in numbers:
        clock.now += seconds
        starts.note(step, seconds)


def test_goodput_counts_the_steps_that_were_kept_over_all_the_time(tmp_path: Path) -> None:
    clock = Clock()
    first = begin(tmp_path, clock)
    clock.now += 10.0  # opening
    steps(first, clock, *range(1, 11))
    assert first.row() == {"perf/goodput": 20 / 30, "health/restarts": 0.0, "health/lost_steps": 0.0}
    clock.now += 30.0  # killed at step 10, started anew on another machine, from the checkpoint of step 6
    second = begin(tmp_path, clock, resumed=6)
    assert second.record.lost_steps == 4
    steps(second, clock, *range(7, 13))
    assert second.seconds == 12.0 + 12.0
    assert second.row() == {"perf/goodput": 24 / 72, "health/restarts": 1.0, "health/lost_steps": 4.0}
    second.end("finished")
    records = read_starts(tmp_path)
    assert [(record.start, record.step, record.outcome) for record in records] == [
        (1, 10, ""),
        (2, 12, "finished"),
    ]
    assert useful_seconds(records) == 24.0


def test_a_rollback_takes_its_steps_out_also_those_of_a_start_before(tmp_path: Path) -> None:
    clock = Clock()
    steps(begin(tmp_path, clock), clock, *range(1, 11))
    second = begin(tmp_path, clock, resumed=10)
    steps(second, clock, *range(11, 15))
    steps(second, clock, 13)  # rolled back to step 12
    assert (second.lost_steps, second.seconds) == (2, 20 + 2 * 2 + 2)
    steps(second, clock, 8)  # and to step 7
    assert (second.lost_steps, second.seconds) == (2 + 6, 7 * 2 + 2)
    assert useful_seconds(read_starts(tmp_path)) == 16.0


def test_starts_without_a_step_are_kept_out_of_the_way(tmp_path: Path) -> None:
    """They died at the step they began with; the next begins lower, or goes back below it."""
    clock = Clock()
    steps(begin(tmp_path, clock), clock, *range(1, 26))
    begin(tmp_path, clock, resumed=20)
    steps(begin(tmp_path, clock, resumed=20), clock, 21, 22)
    fourth = begin(tmp_path, clock, resumed=20)
    steps(fourth, clock, 11)  # rolled back to step 10
    assert (fourth.seconds, fourth.record.from_step) == (10 * 2 + 2, 10)
    fifth = begin(tmp_path, clock, resumed=5)
    assert fifth.row()["perf/goodput"] == fifth.seconds / fifth.wall_seconds()
    assert useful_seconds(read_starts(tmp_path)) == 5 * 2


def test_a_disk_that_is_full_at_the_start_leaves_the_lines_before_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    steps(begin(tmp_path, clock), clock, 1, 2)
    path = tmp_path / "starts.jsonl"
    torn = path.read_bytes() + b'{"start": 2, "ti'
    path.write_bytes(torn)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        second = begin(tmp_path, clock, resumed=2)
    steps(second, clock, 3)
    assert path.read_bytes() == torn
    assert second.row()["health/restarts"] == 1


def test_a_line_cut_short_hides_no_other_start(tmp_path: Path) -> None:
    clock = Clock()
    steps(begin(tmp_path, clock), clock, 1, 2)
    path = tmp_path / "starts.jsonl"
    path.write_bytes(path.read_bytes() + b'{"start": 2, "ti')
    third = begin(tmp_path, clock, resumed=2)
    steps(third, clock, 3)
    assert [record.step for record in read_starts(tmp_path)] == [2, 3]
    lines = path.read_bytes().splitlines()
    assert [len(line) for line in lines] == [LINE - 1, 16, LINE - 1]
    assert json.loads(lines[2])["host"]


@pytest.mark.parametrize("line", ['{"start": 1}', "[]", "7"])
def test_a_line_of_another_version_is_left_out(line: str, tmp_path: Path) -> None:
    clock = Clock()
    steps(begin(tmp_path, clock), clock, 1, 2)
    path = tmp_path / "starts.jsonl"
    known = json.loads(path.read_text())
    path.write_text(path.read_text() + line + "\n" + json.dumps({**known, "step": "x"}) + "\n")
    assert [record.step for record in read_starts(tmp_path)] == [2]


def test_a_clock_that_is_behind_makes_no_goodput_above_one(tmp_path: Path) -> None:
    clock = Clock()
    steps(begin(tmp_path, clock), clock, 1, 2)
    behind = Clock(500.0)
    other = begin(tmp_path, behind, resumed=2)
    steps(other, behind, 3)
    assert 0 < other.goodput() <= 1


def test_other_ranks_write_and_tell_nothing(tmp_path: Path) -> None:
    clock = Clock()
    starts = begin(tmp_path, clock, main=False)
    steps(starts, clock, 1)
    starts.end("finished")
    starts.close()
    assert starts.row() == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refuses", ["open", "read"])
def test_a_folder_that_refuses_ends_no_run(refuses: str, tmp_path: Path, monkeypatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    clock = Clock()
    if refuses == "open":
        (tmp_path / "starts.jsonl").mkdir()
    else:
        (tmp_path / "starts.jsonl").touch()
        monkeypatch.setattr(Path, "read_bytes", fail)
    starts = begin(tmp_path, clock)
    steps(starts, clock, 1)
    starts.end("stopped")
    starts.close()
    assert starts.seconds == 2.0


STAND_IN = """
import sys
from pathlib import Path
from trellis_dist.training.starts import Starts
starts = Starts(Path(sys.argv[1]), main=True, resumed_step=int(sys.argv[2]), world_size=1)
for step in range(int(sys.argv[2]) + 1, 10**9):
    starts.note(step, 0.001)
    print(step, flush=True)
"""


def killed_at(folder: Path, *, resumed: int, least: int) -> int:
    """Start a stand-in, kill it once it did ``least`` steps, and return the last step it told of."""
    # The package itself imports nothing heavy, so the start is quick.
    command = [sys.executable, "-c", STAND_IN, str(folder), str(resumed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = 0
        for line in process.stdout:
            told = int(line)
            if told >= least:
                os.kill(process.pid, signal.SIGKILL)
                break
        rest = [int(line) for line in process.stdout.read().split("\n")[:-1]]
    return max([told, *rest])


def test_what_a_killed_start_did_is_known_to_the_step(tmp_path: Path) -> None:
    first = killed_at(tmp_path, resumed=0, least=40)
    second = killed_at(tmp_path, resumed=30, least=60)
    records = read_starts(tmp_path)
    # A kill may come between a step's note and its word.
    assert records[0].step - first in (0, 1)
    assert records[1].step - second in (0, 1)
    assert records[1].lost_steps == records[0].step - 30
    assert useful_seconds(records) == pytest.approx(records[1].step * 0.001)


def test_a_run_that_resumes_says_so_in_its_rows_events_and_summary(tmp_path: Path, capsys) -> None:
    data, folder = write_dataset(tmp_path / "set"), tmp_path / "run"
    job = make_job(data)
    run(job, folder, stop_at_step=8)
    stopped = capsys.readouterr().err
    assert "stopped: step 8 of 20, 512 tokens" in stopped
    assert stopped.endswith("next: the same command continues from step 8\n")
    (folder / "checkpoints" / "step-00000008").rename(tmp_path / "gone")  # back to step 5
    run(job, folder)
    said = capsys.readouterr().err
    resumed = (
        f"resuming from {folder}/checkpoints/step-00000005: start 2 of the run, which does 3 steps again"
    )
    assert resumed in said
    assert (
        "batch: micro 2 x accumulation 2 x dp 1 = 4 rows of 16 = 64 tokens per step; x 20 steps = 1,280"
        in said
    )
    assert "finished: step 20 of 20, 1,280 tokens" in said
    assert "1 restart(s), 3 step(s) done again" in said
    assert f"checkpoints: 5 in {folder}/checkpoints" not in said  # step 8 is gone
    assert f"checkpoints: 4 in {folder}/checkpoints (steps 5, 10, 15, 20)" in said
    assert said.endswith(f"next: trellis eval {folder}\n")
    ends = [event for event in read_rows(folder / "console.jsonl") if event["kind"] == "end"]
    assert [(end["outcome"], end["step"]) for end in ends] == [("stopped", 8), ("finished", 20)]
    assert ends[1]["lost_steps"] == 3
    assert 0 < ends[1]["goodput"] < 1
    row = read_rows(folder / "metrics.jsonl")[-1]
    assert ends[1]["validation"] == row["loss/validation"]
    assert [record.outcome for record in read_starts(folder)] == ["stopped", "finished"]
    run(job, folder)  # nothing is left to do
    assert capsys.readouterr().err.startswith("finished: step 20 of 20, 1,280 tokens\n")
    assert len(read_starts(folder)) == 2


def test_a_summary_that_fails_makes_no_failure_of_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("step")

    monkeypatch.setattr(loop, "close_run", fail)
    job = make_job(write_dataset(tmp_path / "set"), training={"steps": 2})
    assert run(job, tmp_path / "run").outcome == "finished"
    assert "alert: finished, without a summary: KeyError('step')" in capsys.readouterr().err
    assert [record.outcome for record in read_starts(tmp_path / "run")] == ["finished"]


@pytest.mark.parametrize(
    "outcome, saved, error, line",
    [
        ("stopped", True, "", "the same command continues from step 40"),
        ("terminated", False, "", "the same command begins at step 0: no step is saved"),
        (
            "failed",
            True,
            "no space",
            "put right what the error says; then the same command continues from step 40",
        ),
        ("failed", True, "diverged: start again in another --run-dir", "do what the error says"),
        ("failed", False, "no space", "do what the error says; no step is saved, a start begins at step 0"),
    ],
)
def test_the_next_step_fits_the_error_and_what_is_there(
    outcome: str, saved: bool, error: str, line: str, tmp_path: Path
) -> None:
    if saved:
        (tmp_path / "checkpoints" / "step-00000040").mkdir(parents=True)
    closing = close_run(tmp_path, outcome=outcome, steps=60, tokens_per_step=64, error=error)
    assert closing.text.splitlines()[-1] == f"  next: {line}"
    (tmp_path / "tensorboard").mkdir()
    closing = close_run(tmp_path, outcome=outcome, steps=60, tokens_per_step=64, error=error)
    assert closing.text.splitlines()[-1] == f"  next: {line}; tensorboard --logdir {tmp_path}/tensorboard"
