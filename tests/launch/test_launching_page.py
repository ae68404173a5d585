"""docs/launching.md shows what the dry runs print: each marked command, with the paths of an example."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.clusters.agent import CHECKOUT

PAGE = CHECKOUT / "docs" / "launching.md"
MARK = re.compile(
    r"<!-- (?P<command>\w+ [^\n]*--dry-run) -->\n+```(?P<kind>\w*)\n(?P<shown>.*?)```\n", re.DOTALL
)


def printed(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, in the words of the page."""
    assert cli.main(["launch", *shlex.split(command)]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    python = "/opt/trellis-dist/.venv/bin/python"
    for here, there in (
        (sys.executable, python),
        (str(CHECKOUT), "/opt/trellis-dist"),
        (str(folder), "/shared"),
    ):
        text = text.replace(here, there)
    return text


def shown(command: str, text: str) -> str:
    """The block of the page: the command as a person types it, and what it prints."""
    return f"$ trellis launch {command}\n{text}"


def test_the_page_shows_what_the_dry_runs_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    hosts = re.search(r"\$ cat hosts\n(.*?)```", page, re.DOTALL)
    assert hosts is not None
    Path("hosts").write_text(hosts[1])
    marks = list(MARK.finditer(page))
    kinds = {"torchrun", "deepspeed", "slurm", "ray", "kubernetes"}
    assert {mark["command"].split()[0] for mark in marks} == kinds
    assert len(marks) == page.count("--dry-run -->")
    for mark in marks:
        expected = shown(mark["command"], printed(mark["command"], tmp_path, capsys))
        assert mark["shown"] == expected, f"print it again: trellis launch {mark['command']}"


def test_the_page_names_every_script() -> None:
    page = PAGE.read_text(encoding="utf-8")
    scripts = [*(CHECKOUT / "launch").glob("*/*.sh"), *(CHECKOUT / "launch").glob("*/*.sbatch")]
    named = [str(path.relative_to(CHECKOUT)) for path in scripts if path.parent.name != "clusters"]
    assert len(named) == 5
    assert [name for name in named if name not in page] == []
