"""Several hosts on one machine, with networks and names of their own: preflight, kills, a pulled cable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import rank_job
from benchmarks.namespaces import Hosts, refusal
from benchmarks.node_runs import NodeRun, environment, preflight_command
from launch.failures import cause_of, read_failures, report
from tests.distributed import gloo_pool
from trellis_dist.training.job import Job

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "network namespaces do not work here")

LIMIT_S = 200.0
STEPS = {"training.steps": rank_job.STEPS}
# The command, which waits half a minute for a token on a slow network file system, with less patience.
IMPATIENT = """
import sys
from launch import cli
from launch.nodes import folder
folder.TOKEN_S = 1.0
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(4, tmp_path_factory.mktemp("four")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def preflight(
    hosts: Hosts, commands: list[list[str]], variables: dict[int, dict[str, str]] | None = None
) -> list[tuple[int, str, str]]:
    """Status, output and errors of every host's command, which run together."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        hosts.popen(host, line, env={**environment(), **(variables or {}).get(host, {})}, **options)
        for host, line in enumerate(commands)
    ]
    ended = [process.communicate(timeout=LIMIT_S) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended, strict=True)]


DRIVER = """
import sys, time
from pathlib import Path
from benchmarks.namespaces import Hosts
hosts = Hosts(1, Path(sys.argv[1]))
print(hosts.popen(0, ["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def test_a_driver_that_is_killed_takes_what_runs_on_its_hosts_with_it(tmp_path: Path) -> None:
    line = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment()})
    assert driver.stdout is not None
    left = Path(f"/proc/{int(driver.stdout.readline())}")
    assert left.is_dir()
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + LIMIT_S
    while _runs(left):
        assert time.monotonic() < deadline, "it outlives the driver"
        time.sleep(0.05)


def _runs(process: Path) -> bool:
    try:
        status = (process / "stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return "(sleep)" in status and status.rpartition(")")[2].split()[0] != "Z"


def test_two_hosts_pass_and_their_network_is_measured(four: Hosts, shared: Path, tmp_path: Path) -> None:
    line = preflight_command(shared, tmp_path / "run", 2, "--json")
    (status, said, wrong), (second, other, _) = preflight(four, [line] * 2)
    assert (status, second) == (0, 0), said + wrong
    found = json.loads(said)
    assert found == json.loads(other)
    assert [(node["host"], node["address"]) for node in found["nodes"]] == [
        ("host0", "10.77.0.1"),
        ("host1", "10.77.0.2"),
    ]
    assert found["all_reduce"] > 0
    assert [link[:2] for link in found["links"]] == [[0, 1]]
    assert found["nodes"][0]["packages"]["torch"] == found["nodes"][1]["packages"]["torch"]


def test_of_four_hosts_the_one_with_another_version_is_named(
    four: Hosts, shared: Path, tmp_path: Path
) -> None:
    """What Python finds as the version of a package on host2 is another one."""
    fake = tmp_path / "packages" / "triton-0.0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.0.1\n")
    path = {"PYTHONPATH": f"{fake.parent}:{environment()['PYTHONPATH']}"}
    line = preflight_command(shared, tmp_path / "run", 4, "--no-bandwidth")
    lines = [[*line, f"--node-rank={host}"] for host in range(4)]
    for status, _, wrong in preflight(four, lines, {2: path}):
        assert status == 1
        (error,) = [text for text in wrong.splitlines() if text.startswith("trellis: ")]
        assert error.startswith("trellis: error: node 2 (host2, 10.77.0.3): triton 0.0.1, 3 of 4 nodes have ")


def test_a_host_with_another_run_folder_is_named(four: Hosts, shared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    four.mount_apart(1, run_dir)
    line = preflight_command(shared, run_dir, 2, "--no-bandwidth")
    patient = line.index("launch.cli")
    line[patient - 1 : patient + 1] = ["-c", IMPATIENT]
    for status, _, wrong in preflight(four, [line] * 2):
        assert status == 1
        (error,) = [text for text in wrong.splitlines() if text.startswith("trellis: ")]
        assert error.startswith("trellis: error: node 1 (host1, 10.77.0.2): run folder: ")
        assert "on host1 is not the folder that rank 0 writes to" in error


def train(job: Job, run_dir: Path) -> None:
    from trellis_dist.training.loop import run

    run(job, run_dir)


def test_a_killed_rank_is_started_again_on_both_hosts_and_the_run_is_what_it_would_have_been(
    shared: Path, tmp_path: Path
) -> None:
    with (
        Hosts(2, tmp_path) as hosts,
        NodeRun(hosts, tmp_path / "killed", shared, STEPS, "--no-preflight", "--max-restarts", "2") as killed,
    ):
        killed.wait_for_step(7)
        killed.kill_ranks(1)
        assert killed.end() == [0, 0], killed.said(0) + killed.said(1)
    # Undisturbed, on ranks that are there already, which saves a start.
    gloo_pool(2).run(train, rank_job.job(shared, {**STEPS, "training.engine": "local"}), tmp_path / "whole")
    said = "\n".join(killed.errors(0) + killed.errors(1))
    assert "rank 1 on host1" in said
    assert rank_job.compare(tmp_path / "killed", tmp_path / "whole") == ""


def test_a_host_whose_cable_is_pulled_is_named_in_time(shared: Path, tmp_path: Path) -> None:
    """And no healthy host is named as the cause, on the terminal that is left or in the run's folder."""
    with (
        Hosts(2, tmp_path) as hosts,
        NodeRun(
            hosts,
            tmp_path / "run",
            shared,
            {"training.steps": 100_000, "training.step_timeout_s": 12.0, "checkpoint.interval": 50},
            "--no-preflight",
        ) as run,
    ):
        run.wait_for_step(7)
        hosts.cut(1)
        assert run.end([0]) == [1, run.agents[1].poll()]
        run.wait(lambda: any(failure.rank == 1 for failure in read_failures(run.run_dir)))
        failures = read_failures(run.run_dir)
    (line,) = run.errors(0)
    assert "rank 1 (host1, pid " in line
    assert "has not been heard of for" in line
    assert "rank 0 (host0" not in line
    assert "rank 1 (host1, pid " in report(cause_of(failures))
    own = next(failure for failure in failures if failure.rank == 1)
    assert "host1 itself is cut off: eth0 has no link" in own.message
