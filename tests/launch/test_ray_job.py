"""Ray: jobs submitted to a real cluster of two nodes on this machine; agents and ranks are real processes."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.clusters import ray as jobs
from launch.clusters.agent import CHECKOUT, Agents
from launch.clusters.ray_driver import FIRST, MASTER
from launch.clusters.work import Work, read_work
from tests.launch.rank_stand_in import BASE, write_script
from tests.launch.stand_in_python import write_python


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two Ray nodes of two CPUs each, the first with the dashboard that takes jobs."""
    from ray.cluster_utils import Cluster

    # Ray's own port of the agent that starts jobs is the first cluster's, which may be another room's.
    ports = {name: free_port() for name in ("dashboard_port", "dashboard_agent_listen_port")}
    head = {"num_cpus": 2, "include_dashboard": True, **ports}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=2)
    made.wait_for_nodes()
    yield made
    made.shutdown()  # type: ignore[no-untyped-call]


def stand_in(folder: Path, *scripts: list[str]) -> tuple[Work, list[str]]:
    """A run whose ranks do as ``scripts`` say, and the driver that `trellis launch ray` would submit."""
    run_dir = folder / "run"
    write_script(run_dir, *scripts)
    work = read_work(BASE, ["--run-dir", str(run_dir)], preflight=False)
    work = dataclasses.replace(work, python=write_python(folder))
    agents = Agents(nodes=2, ranks_per_node=1, master=MASTER, port=free_port())
    return work, [*jobs.driver_command(agents, work, jobs.Workers()), "--settle=1"]


def submission(cluster: Any, driver: list[str]) -> list[str]:
    """The command that hands the driver to the cluster as a job, and follows it."""
    agents = Agents(nodes=2, ranks_per_node=1, master=MASTER)
    address = f"http://{cluster.webui_url}"
    return jobs.submit_command(agents, driver, address=address, python=sys.executable, wait=True)


def start(command: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    ranks = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS")
    variables = {name: value for name, value in os.environ.items() if name not in ranks}
    with log.open("wb") as file:
        return subprocess.Popen(command, env={**variables, **more}, stdout=file, stderr=subprocess.STDOUT)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def listen(run_dir: Path) -> bool:
    return all((run_dir / f"listening-{rank}").exists() for rank in (0, 1))


def test_jobs_end_with_the_status_of_their_nodes_and_a_stopped_one_lets_its_ranks_save(
    cluster: Any, tmp_path: Path
) -> None:
    """Two jobs side by side: one trains until it is stopped, the other's nodes only say which they are."""
    from ray.job_submission import JobSubmissionClient

    # Rank 0 takes longer to save than Ray, unless told, lets a job stop.
    work, driver = stand_in(tmp_path, ["asked,sleep 6"], ["asked"])
    plain = [*driver[:-2], f"--line=echo node, first: {FIRST}, threads: ${{OMP_NUM_THREADS-shared}}"]
    stopped, done = (tmp_path / "stopped", tmp_path / "done")
    training, saying = start(submission(cluster, driver), stopped), start(submission(cluster, plain), done)
    assert saying.wait(timeout=240) == 0, done.read_text()
    assert sorted(re.findall(r"node, first: \d, .*", done.read_text())) == [
        "node, first: 0, threads: shared",
        "node, first: 1, threads: shared",
    ]
    until(lambda: listen(work.run_dir))
    client = JobSubmissionClient(f"http://{cluster.webui_url}")
    (running,) = [found for found in client.list_jobs() if found.status == "RUNNING"]
    name = str(running.submission_id)
    client.stop_job(name)
    training.wait(timeout=240)
    # What rank 0 prints is the output of the job.
    assert "trellis: ended by a signal" in client.get_job_logs(name)
    assert client.get_job_info(name).status == "STOPPED"


def test_a_node_that_dies_is_named(cluster: Any, tmp_path: Path) -> None:
    """The driver by itself, as the jobs above run it; it takes the second node away."""
    work, driver = stand_in(tmp_path, ["asked"], ["asked"])
    variables = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(CHECKOUT)}
    running = start(driver, tmp_path / "log", **variables)
    until(lambda: listen(work.run_dir))
    (second,) = cluster.worker_nodes
    raylet = second.all_processes["raylet"][0].process
    raylet.kill()
    raylet.wait()  # one that is dead and not yet waited for counts as alive for its workers
    assert running.wait(timeout=240) == 1
    ranks = [int((work.run_dir / f"listening-{rank}").read_text()) for rank in (0, 1)]
    until(lambda: not any(alive(rank) for rank in ranks))  # Ray killed the agent of the dead node
    said = (tmp_path / "log").read_text()
    assert re.search(
        rf"error: node [01] \({re.escape(socket.gethostname())}, .*\) died, or the cluster", said
    )


def test_too_few_nodes_are_said_with_what_the_cluster_has(cluster: Any) -> None:
    import ray

    from launch.clusters.ray_driver import _place

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match=r"no 9 nodes with CPU 1 free within .*the cluster has .* CPU 2"):
            _place(9, {"CPU": 1}, seconds=0.5)
    finally:
        ray.shutdown()
