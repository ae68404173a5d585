"""Metrics: each step once after a resume, events that read back, console lines."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trellis_dist.training.console import Console
from trellis_dist.training.metrics import JsonLines, MetricsWriter, read_rows


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss/train": 1.0 / step} for step in steps]


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, resumed_step=0)
    for row in rows(1, 2, 3, 4):
        sink.write(row)
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "loss/tr')  # what a kill in the middle of a write leaves
    sink = JsonLines(path, resumed_step=2)
    for row in rows(3, 4, 5):
        sink.write(row)
    sink.close()
    assert read_rows(path) == rows(1, 2, 3, 4, 5)


def test_non_finite_values_stay_json(tmp_path: Path):
    sink = JsonLines(tmp_path / "m.jsonl", resumed_step=0)
    sink.write({"step": 1, "loss/train": float("nan"), "optim/gradient_norm": float("inf")})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss/train": None,
        "optim/gradient_norm": None,
    }
    sink.close()


def test_tensorboard_events_read_back_and_hide_what_a_resume_repeats(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(resumed: int, *some: dict[str, float]) -> None:
        writer = MetricsWriter(
            tmp_path, main=True, resumed_step=resumed, steps=9, tensorboard=True, progress=False
        )
        for row in some:
            writer.write(row)
        writer.close()

    write(0, {"step": 1, "loss/train": 5.0}, {"step": 6, "loss/train": 5.0})  # killed before its first save
    write(0, *rows(1, 2, 3))
    write(2, *[{"step": 3, "loss/train": 7.0}, {"step": 4, "loss/train": 8.0}])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert got == [(1, 1.0), (2, 0.5), (3, 7.0), (4, 8.0)]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path: Path):
    writer = MetricsWriter(tmp_path, main=False, resumed_step=0, steps=9, tensorboard=True, progress=True)
    writer.advance(1)
    writer.write(rows(1)[0])
    writer.say("nothing")
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_console_line_has_progress_eta_and_the_numbers():
    now, out = [0.0], io.StringIO()
    console = Console(steps=100, first=0, progress=True, stream=out, clock=lambda: now[0])
    for step in range(1, 11):
        now[0] += 2.0
        console.advance(step)
    console.line(
        {
            "step": 10,
            "loss/train": 3.25,
            "optim/gradient_norm": 0.5,
            "optim/lr": 1e-3,
            "perf/tokens_per_second": 12345.6,
        }
    )
    assert out.getvalue() == (
        "step 10/100 (10%) | ETA 3:00 | loss 3.2500 | grad norm 0.500 | 12,346 tokens/s | lr 1.00e-03\n"
    )
    console.line({"step": 10, "perf/eta_seconds": 61.0, "health/skipped_steps": 0.0})
    assert out.getvalue().endswith("\nstep 10/100 (10%) | ETA 1:01\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar():
    out = Terminal()
    console = Console(steps=4, first=2, progress=True, stream=out)
    console.advance(3)
    console.say("a line above the bar")
    console.close()
    assert "3/4" in out.getvalue() or "2/4" in out.getvalue()
    assert "a line above the bar\n" in out.getvalue()


def test_a_disk_too_full_to_go_back_takes_later_rows(tmp_path: Path, monkeypatch, capsys):
    from trellis_dist.training import writers

    writer = MetricsWriter(tmp_path, main=True, resumed_step=0, steps=9, tensorboard=False, progress=False)
    for row in rows(1, 2, 3):
        writer.write(row)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writers, "atomic_write", full)
        writer.rewind(1)
    assert "alert: the metrics of step 1 were not written" in capsys.readouterr().err
    writer.write(rows(4)[0])
    writer.rewind(3)
    writer.write(rows(5)[0])
    writer.close()
    assert read_rows(tmp_path / "metrics.jsonl") == rows(1, 2, 3, 5)


def test_a_full_disk_is_announced_and_survived(tmp_path: Path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path, main=True, resumed_step=0, steps=9, tensorboard=False, progress=False)

    def full(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonLines, "write", full)
    writer.write(rows(1)[0])
    writer.close()
    assert "alert: the metrics of step 1 were not written" in capsys.readouterr().err


FULL = """
import resource, sys
from pathlib import Path
from trellis_dist.training.metrics import MetricsWriter
folder = Path(sys.argv[1])
writer = MetricsWriter(folder, main=True, resumed_step=0, steps=99, tensorboard=True, progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
for step in range(1, 60):
    writer.write({"step": step, "loss/train": 1.0, "optim/lr": 0.5})
try:
    try:
        raise ValueError("what the run has to say")
    finally:
        writer.close()
except Exception as error:
    print(repr(error))
"""


def test_a_file_that_may_not_grow_costs_rows_and_hides_no_error(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    # TensorBoard's thread prints its own traceback, at any time, so only whole lines of ours are looked for.
    assert done.stdout == "ValueError('what the run has to say')\n", done.stderr
    assert done.stderr.count("alert: no TensorBoard events from step") == 1
    alerts = done.stderr.count("were not written: [Errno 27]")
    written = read_rows(tmp_path / "metrics.jsonl")
    assert 1 <= len(written) < 59
    assert alerts == 59 - len(written)
