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
import torch
import torch.distributed as dist

from launch import cluster
from launch.cli import main
from launch.ranks import RankError
from tests.distributed import gloo_pool
from trellis_dist.files import write_json
from trellis_dist.parallel import env
from trellis_dist.training.parity import connect, run
from trellis_dist.training.parity.cases import OperationCase
from trellis_dist.training.parity.compare import CaseResult, Failure, Findings
from trellis_dist.training.parity.connect import LostContactError, LostRanksError, Place
from trellis_dist.training.parity.run import Matrix

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
    assert (found["device_names"], found["versions"]["torch"]) == (["cpu"], torch.__version__)


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
    assert lines[2:] == ["pass: 1 of 1 cases"]


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
    verdict = cluster.render_verdict(report(not_run={"sp4": "needs 4 ranks", "tp4": "needs 4 ranks"}))
    assert verdict.splitlines()[1:] == ["pass: 1 of 3 cases (2 need other numbers of ranks)"]
    assert cluster.render_verdict(report(cases=[], passed=False)) == "FAIL: no case fits these ranks"


class OnlyOrder:
    """A matrix of a number of ranks that no case fits."""

    world_size = 3

    def check_order(self) -> CaseResult:
        return CaseResult(name="order", seconds=1.0, worst={}, failures=())

    def measure_neighbours(self) -> list[Any]:
        return []


def test_the_order_of_messages_alone_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_run_cases", lambda *_, **__: ([], {"sp4": "needs 4 ranks"}))
    said: list[str] = []
    places = [Place(host="here", device="cuda", versions={"torch": "2"})]
    found = cluster._report(OnlyOrder(), places, only=(), device="cpu", steps=2, say=said.append)  # type: ignore[arg-type]
    assert not found["passed"]
    assert len(found["cases"]) == 1
    assert said[-1].splitlines()[-1] == "FAIL: no case fits these ranks"


def test_a_case_says_each_failure_once() -> None:
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
deadline.AFTER_ERROR_S = 0.2
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


# What each rank runs instead of torchrun's: a command line, with a fault put in.
RANK = """
import os, sys, time
from trellis_dist.training.parity import connect, deadline, run
from trellis_dist.training.parity.compare import Findings
fault, rank = sys.argv.pop(1), int(os.environ["RANK"])

def end(name, mesh):
    if rank == 1:
        sys.stderr.write("rank 1 dies\\n")
        os._exit(9)
    return Findings()

if fault == "a rank ends":
    run.compare_operation = end
if fault == "other versions" and rank == 1:
    connect._LIBRARIES = ()
if fault == "nobody comes":
    connect.CONNECT_SECONDS = 1.0
from launch.cli import main
status = main(sys.argv[1:])
import torch
print(torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, file=sys.stderr)
sys.exit(status)
"""


def run_ranks(fault: str, *, start: int = 2) -> list[tuple[int, str]]:
    """Exit status and error output of each of two ranks, of which ``start`` are started."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",  # as in NVIDIA's containers
        "PYTHONPATH": str(ROOT),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    command = [sys.executable, "-c", RANK, fault, "doctor", "--cluster", "--case=operation sp2"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(start)
    ]
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_a_case_computes_in_fp32_where_the_environment_asks_for_tf32() -> None:
    assert run_ranks("none") == [(0, "highest False\n")] * 2


def test_a_rank_whose_peer_died_says_so_in_one_line() -> None:
    alive, dead = run_ranks("a rank ends")
    assert dead == (9, "rank 1 dies\n")
    line = f"trellis: error: rank 0 on {socket.gethostname()}: case operation sp2: lost contact with a rank; "
    assert alive == (1, f"{line}the rank that failed says why\n")


def test_ranks_of_different_versions_are_refused_in_one_line() -> None:
    for rank, (status, text) in enumerate(run_ranks("other versions")):
        host = socket.gethostname()
        assert status == 1
        (line,) = text.splitlines()
        assert line.startswith(
            f"trellis: error: rank {rank} on {host}: ranks run different versions: rank 0 on {host} has "
        )
        assert f"; rank 1 on {host} has deepspeed not installed" in line


def test_a_rank_that_waits_for_the_others_in_vain_says_what_to_set() -> None:
    ((status, text),) = run_ranks("nobody comes", start=1)
    assert status == 1
    (line,) = text.splitlines()
    where = (
        f"connecting: rank 0 on {socket.gethostname()} did not finish in 1 s; the ranks meet at MASTER_ADDR="
    )
    assert line.startswith(where)
    assert "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in line


def test_a_connection_that_fails_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error in: somewhere\nLast error:\nDuplicate GPU detected\n")

    monkeypatch.setattr(env, "init_distributed", refuse)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(LostRanksError) as error:
        connect.connect(torch.device("cpu"), timeout_s=1.0)
    where = "connecting: Duplicate GPU detected; the ranks meet at MASTER_ADDR=node7 MASTER_PORT=29500; "
    assert str(error.value).startswith(where)


def leave_a_message() -> list[Any]:
    """A case that fails on rank 0 after a send that nobody receives, then one that is sound."""
    matrix = Matrix(steps=2, device=torch.device("cpu"))

    def work() -> Findings:
        mesh = matrix._line(2)
        if env.rank() == 0:
            dist.isend(torch.zeros(3), 1, group=mesh.rightward)
            raise ValueError("too few heads")
        return Findings()

    return [matrix._result("broken", work), matrix.run(OperationCase(sp=2))]


def test_a_message_that_an_error_leaves_behind_reaches_no_later_case() -> None:
    for broken, sound in gloo_pool(2).run(leave_a_message):
        assert [failure.line() for failure in broken.failures] == [
            f"rank 0 on {socket.gethostname()}: ValueError: too few heads"
        ]
        assert sound.passed


def fall_out_of_step() -> tuple[str, bool]:
    """A case that fails on rank 0, after which rank 1 cannot sum with the others."""
    matrix = Matrix(steps=2, device=torch.device("cpu"))

    def work() -> Findings:
        if env.rank() == 0:
            raise ValueError("too few heads")
        return Findings()

    def sums(device: torch.device) -> None:
        connect.check_sums(device)
        if env.rank() == 1:
            raise RuntimeError("out of step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_sums", sums)
        with pytest.raises(LostRanksError) as error:
            matrix._result("broken", work)
    return str(error.value), isinstance(error.value, LostContactError)


def test_ranks_that_an_error_left_out_of_step_end_and_rank_0_says_it() -> None:
    cause = f"case broken: rank 0 on {socket.gethostname()}: ValueError: too few heads"
    told = [(f"{cause}; the ranks have lost each other", echo) for echo in (False, True)]
    assert gloo_pool(2).run(fall_out_of_step) == told


def test_a_sum_that_met_another_collective_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.fill_(6.0))
    monkeypatch.setattr(env, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 ranks sum to 6 on cpu: out of step"):
        connect.check_sums(torch.device("cpu"))
