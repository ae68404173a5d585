"""The benchmark of runs over several hosts: who a line blames, and the table of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.nodes import RESULT, _blames, cases, render
from trellis_dist.files import read_json

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"


HANG = "no progress on rank 2 (step 9, update: more than 10 s)"
SILENT = "rank 1 (host1, pid 7) has not been heard of for 13 s; its last operation: step 9, update"


@pytest.mark.parametrize(
    "line, named",
    [
        (f"{HANG}: {SILENT}", ["host1"]),
        (
            "rank 0 on host0 in step 9, update: lost the connection to another rank (reset); no word from "
            "rank 1 on host1 in step 9, update",
            ["host1"],
        ),
        ("rank 1 on host1: killed by SIGKILL (out of memory?)", ["host1"]),
        (
            f"{HANG}: the job's store on host0 does not answer: rank 0, which keeps it, is stopped or gone, "
            "or host2 is cut off from it",
            ["host0"],
        ),
        (f"{HANG}: the network: host1 itself is cut off: eth0 has no link", ["host1"]),
        (f"{HANG}: {SILENT}; {SILENT.replace('1', '2')}", ["host1", "host2"]),
    ],
)
def test_a_line_blames_the_host_that_it_says_is_gone(line: str, named: list[str]) -> None:
    assert [name for name in ("host0", "host1", "host2") if _blames(line, name)] == named


def test_the_table_of_the_page_is_that_of_the_record(tmp_path: Path) -> None:
    record = read_json(RESULT)
    text = PAGE.read_text(encoding="utf-8")
    assert text.split("<!-- nodes table -->\n")[1].split("\n<!-- end -->")[0] == render(record)
    every = {case.name for case in cases(tmp_path)}
    assert set(record["cases"]) == every if record["complete"] else set(record["cases"]) < every
    assert len(record["cases"]) >= 8
    assert all(row["passed"] for row in record["cases"].values())
