"""The console: lines that fit, a bar only where one can be drawn, events a program can follow."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from trellis_dist.training.announce import recipe_lines
from trellis_dist.training.console import Console, append_event, interval_line, short_time
from trellis_dist.training.metrics import read_rows

ROW = {
    "step": 50,
    "loss/train": 3.25,
    "optim/gradient_norm": 0.5,
    "perf/tokens_per_second": 12345.6,
    "perf/mfu": 0.4125,
    "memory/peak_bytes": 3 * 2**29,
    "perf/goodput": 0.987,
    "optim/lr": 1e-3,
    "health/restarts": 0.0,
    "health/lost_steps": 7.0,
}
WHOLE = (
    "step 50/200 (25%) | ETA 1:02:03 | loss 3.2500 | grad norm 0.500 | 12,346 tokens/s | MFU 41.2% | "
    "memory 1.50 GiB | goodput 98.7% | lr 1.00e-03 | lost steps 7"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_a_line_says_all_that_the_row_has() -> None:
    assert interval_line(ROW, steps=200, eta=3723.9) == WHOLE


@pytest.mark.parametrize("width", [30, 80, 100, 120, len(WHOLE)])
def test_a_narrow_terminal_gets_the_most_important_first(width: int) -> None:
    line = interval_line(ROW, steps=200, eta=3723.9, width=width)
    assert len(line) <= width
    assert WHOLE.startswith(line)
    following = WHOLE[len(line) :].split(" | ")[1:2]
    assert not following or len(line) + 3 + len(following[0]) > width  # no more would have fitted


def test_times_are_short() -> None:
    assert [short_time(seconds) for seconds in (0.9, 61, 3600, 90061)] == [
        "0:00",
        "1:01",
        "1:00:00",
        "25:01:01",
    ]


def test_a_terminal_gets_a_bar_with_live_numbers_below_the_lines(terminal: Terminal) -> None:
    now = [0.0]
    console = Console(steps=40, first=2, progress=True, stream=terminal, clock=lambda: now[0])
    assert console.width == 80
    for step in (3, 4):
        now[0] += 2.0
        console.advance(step, loss=2.5, tokens_per_second=1234.0)
    console.line({**ROW, "step": 4})
    console.close()
    shown = terminal.getvalue()
    assert "4/40" in shown
    assert "ETA 1:12" in shown
    assert "loss 2.5000" in shown
    assert "1,234 tokens/s" in shown
    assert "step 4/40 (10%) | ETA 1:12 | loss 3.2500 | grad norm 0.500 | 12,346 tokens/s\n" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex(
        "\x1b[?25l"
    )  # the cursor is there, whatever ends the rank


def test_no_color_leaves_the_bar_without_colours(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(steps=4, first=0, progress=True, stream=terminal)
    console.advance(1, loss=1.0)
    console.say("alert: look")
    console.close()
    assert "1/4" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()  # the codes of foreground colours


@pytest.mark.parametrize("case", ["a file", "a dumb terminal", "switched off"])
def test_elsewhere_there_are_plain_lines(
    case: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it
    stream = io.StringIO() if case == "a file" else terminal
    if case == "a dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    console = Console(steps=200, first=0, progress=case != "switched off", stream=stream)
    console.advance(50, loss=1.0)
    console.say("alert: [bold]look[/bold]")
    console.line(ROW)
    console.close()
    assert stream.getvalue() == "alert: [bold]look[/bold]\n" + WHOLE.replace(" | ETA 1:02:03", "") + "\n"


def test_a_terminal_shows_words_in_brackets_as_they_are(terminal: Terminal) -> None:
    console = Console(steps=4, first=0, progress=True, stream=terminal)
    console.say("*lr=0.1 [0.003] [red]", kind="start")
    console.close()
    assert "*lr=0.1 [0.003] [red]" in terminal.getvalue()


def test_what_is_printed_can_be_followed_as_json_lines(tmp_path: Path) -> None:
    log, out = tmp_path / "console.jsonl", io.StringIO()
    console = Console(steps=4, first=0, progress=True, stream=out, log=log)
    console.say("model: 3 parameters", kind="start", steps=4, mesh={"dp": 2})
    console.say("alert: a loss")
    console.say("upload: done")
    append_event(log, "failure", "rank 1 is gone", outcome="failed")  # another process
    console.say("finished: step 4", kind="end", outcome="finished")
    events = read_rows(log)
    kinds = ["start", "alert", "note", "failure", "end"]
    assert [event["kind"] for event in events] == kinds
    assert events[0]["mesh"] == {"dp": 2}
    assert (events[4]["outcome"], events[4]["text"]) == ("finished", "finished: step 4")
    assert all(events[index]["time"] <= events[index + 1]["time"] for index in range(4))
    assert "rank 1" not in out.getvalue()


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(steps=4, first=0, progress=False, stream=out, log=tmp_path / "absent" / "console.jsonl")
    console.say("one")
    console.say("two")
    lines = out.getvalue().splitlines()
    assert [lines[0], lines[2]] == ["one", "two"]
    assert lines[1].startswith("alert: ")
    assert lines[1].endswith("console.jsonl is not written until the next start")


class Gone(Terminal):
    def write(self, _: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("progress", [False, True])
def test_a_terminal_that_went_away_ends_no_run(terminal: Terminal, progress: bool, tmp_path: Path) -> None:
    console = Console(steps=4, first=0, progress=progress, stream=Gone(), log=tmp_path / "log")
    console.advance(1)
    console.say("a word")
    console.line({"step": 1})
    console.close()
    assert json.loads((tmp_path / "log").read_text())["text"] == "a word"


def test_the_recipe_is_whole_and_what_differs_is_marked() -> None:
    recipe = {
        "name": "tiny",
        "choices": {"model.dim": "ours"},
        "model": {"dim": 8, "trellis": {"slots": 4, "chunk_size": 64}},
        "data": {"mixture": {}, "sequence_length": 16},
    }
    lines = recipe_lines(recipe, {"model.trellis.slots": 64}, width=60)
    assert lines == [
        "recipe tiny: 1 values differ from their defaults: *value [default]",
        "  model       dim=8, trellis.slots=*4 [64],",
        "              trellis.chunk_size=64",
        "  data        mixture={}, sequence_length=16",
    ]
    assert all(len(line) <= 60 for line in lines[1:])


def test_a_terminal_without_rich_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)  # as where it is not installed
    console = Console(steps=10, first=0, progress=True, stream=terminal)
    console.say("hello")
    console.close()
    assert terminal.getvalue() == "hello\n"
