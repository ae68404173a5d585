"""`trellis doctor --cluster`: ranks started here or by torchrun, a verdict, no silence when a case hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cluster
from launch.cli import main
from launch.ranks import RankError
from trellis_dist.files import write_json

ROOT = Path(__file__).resolve().parents[2]
CASE = {"name": "sp2", "seconds": 1.0, "worst": {"loss": 1e-8}, "failures": [], "passed": True}


def report(**changes: Any) -> dict[str, Any]:
    made = {
        "passed": True,
        "world_size": 2,
        "device": "cpu",
        "hosts": ["here"],
        "steps": 20,
        "cases": [CASE],
        "not_run": {},
        "neighbours": [],
    }
    return made | changes


def test_ranks_start_here_and_one_case_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "2", "--steps", "2", "--case", "operation sp2", "--case", "sp4"]
    assert main(["doctor", "--cluster", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (case,) = found["cases"]
    assert (case["name"], case["passed"], case["failures"]) == ("operation sp2", True, [])
    assert found["not_run"] == {"sp4": "needs 4 ranks or a multiple"}
    assert (found["world_size"], found["hosts"]) == (2, [socket.gethostname()])


def test_under_torchrun_it_is_one_of_the_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [
        "--nproc-per-node=2",
        "-m",
        "launch.cli",
        "doctor",
        "--cluster",
        "--steps=2",
        "--case=sp2 packed",
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {**os.environ}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(f"2 ranks on 1 machine(s): {socket.gethostname()}; cpu; 2 steps")
    assert lines[1].startswith("sp2 packed ")
    assert " pass " in lines[1]
    assert lines[2:] == ["pass: 1 cases"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--cluster", "--ranks", "1"], "use --ranks 2 or more"),
        (["--cluster", "--steps", "0"], "--steps 0: use 1 or more"),
        (["--cluster", "--case", "spp2"], "did you mean sp2"),
        (["--cluster", "RUN"], "give one of the two"),
        ([], "give one of the two"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 1
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1


def test_a_failed_case_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_ranks(count: int, *, run_dir: Path, arguments: list[str], module: str) -> None:
        assert (count, module) == (2, "launch.cluster")
        assert arguments == [f"--folder={run_dir}", "--steps=3"]
        write_json(run_dir / "report.json", report(passed=False))

    monkeypatch.setattr(cluster, "run_ranks", run_ranks)
    assert main(["doctor", "--cluster", "--ranks", "2", "--steps", "3"]) == 1
    assert not capsys.readouterr().err


def test_a_rank_that_died_leaves_its_stacks_and_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_ranks(count: int, *, run_dir: Path, **_: Any) -> None:
        raise RankError("case sp2: rank 1 on node7 did not finish in 300 s", "the stacks")

    monkeypatch.setattr(cluster, "run_ranks", run_ranks)
    assert main(["doctor", "--cluster", "--ranks", "2"]) == 1
    printed = capsys.readouterr().err
    assert "the stacks" in printed
    assert "error: case sp2: rank 1 on node7 did not finish in 300 s (logs of the ranks: " in printed


def test_a_report_names_what_failed_and_what_did_not_run() -> None:
    failed = {**CASE, "name": "tp2", "passed": False}
    verdict = cluster.render_verdict(
        report(cases=[CASE, failed], not_run={"sp4": "needs 4 ranks or a multiple", "x": "needs 8"})
    )
    assert verdict.splitlines() == [
        "not run, needs 4 ranks or a multiple: sp4",
        "not run, needs 8: x",
        "FAIL: 1 of 2 cases: tp2",
    ]
    assert cluster.render_verdict(report(cases=[])) == "FAIL: no case fits these ranks"


def test_a_case_says_each_failure_once() -> None:
    from trellis_dist.training.parity.compare import CaseResult, Failure

    failures = [
        Failure(case="c", quantity="error", expected="none", found="it broke", rank=rank, host="h")
        for rank in range(8)
    ]
    failures += [
        Failure(case="c", quantity=f"gradient/{i}", expected="1", found="2", step=i, rank=i, host="h")
        for i in range(5)
    ]
    shown = cluster.render_case(CaseResult(name="c", seconds=1.0, worst={}, failures=tuple(failures)))
    lines = shown.splitlines()
    assert "FAIL" in lines[0]
    assert lines[1].strip() == "rank 0 on h: it broke"
    assert lines[2].strip() == "step 0, rank 0 on h: gradient/0: expected 1, found 2"
    assert lines[-1].strip() == "and 9 more"


HANG = """
import sys, time
from trellis_dist.training.parity import deadline
deadline._AFTER_ERROR_S = 0.2
clock = deadline.Deadline(float(sys.argv[1]), lambda line, stacks: print("RECORDED", line))
with clock.within("case ends"):
    pass
with clock.within("case sp2"):
    if len(sys.argv) > 2:
        clock.note(ValueError(sys.argv[2]))
    time.sleep(100)
"""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["0.5"], "case sp2: rank 0 on {host} did not finish in 0.5 s"),
        (["90", "too few heads"], "case sp2: rank 0 on {host} raised ValueError: too few heads; other ranks"),
    ],
)
def test_a_hang_ends_with_the_name_of_the_case_and_the_stacks(arguments: list[str], words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", HANG, *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 1
    said = words.format(host=socket.gethostname())
    assert said in ran.stderr
    assert 'File "<string>", line' in ran.stderr
    assert f"RECORDED {said}" in ran.stdout
