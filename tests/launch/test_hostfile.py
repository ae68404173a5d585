"""A hostfile's machines, started over an ssh that runs commands here: two agents, two ranks, signals."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.clusters.agent import CHECKOUT, Agents
from launch.clusters.deepspeed import Host, dry_run, host_commands, run_hosts
from launch.clusters.patience import Patience
from launch.clusters.work import Work, read_work
from tests.launch.rank_stand_in import BASE, starts, write_script
from tests.launch.stand_in_python import write_python

HOSTS = [Host("worker-0", 1), Host("worker-1", 1)]
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift 2; done
printf '%s\\n' "$1" >>"$FAKES/reached"
shift
exec bash -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose bin/, with an ssh that stays here, is on the path."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKES", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def agents_here() -> Agents:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Agents(nodes=2, ranks_per_node=1, master="127.0.0.1", port=port, max_restarts=1, grace_s=500.0)


def stand_in(folder: Path, *scripts: list[str]) -> Work:
    run_dir = folder / "run"
    write_script(run_dir, *scripts)
    work = read_work(BASE, ["--run-dir", str(run_dir)], preflight=False)
    return dataclasses.replace(work, python=write_python(folder))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_are_started_again_on_all_hosts_and_a_signal_reaches_them_there(ssh: Path) -> None:
    """A second signal ends them at once.

    The first is answered by a save that does not end; the test has no time for the grace of 500 s.
    """
    work = stand_in(ssh, ["lose", "stubborn"], ["kill", "stubborn"])
    run_dir, done = work.run_dir, threading.Event()

    def ask_twice() -> None:
        until(lambda: all((run_dir / f"listening-{rank}").exists() for rank in (0, 1)))
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: all((run_dir / f"saving-{rank}").exists() for rank in (0, 1)))
        while not done.wait(0.5):  # a signal within two seconds of the first belongs to it
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_twice)
    thread.start()
    try:
        assert run_hosts(host_commands(agents_here(), work, HOSTS), HOSTS, grace_s=500.0) == 75
    finally:
        done.set()
        thread.join()
    assert [starts(run_dir, rank) for rank in (0, 1)] == [2, 2]
    assert [rank for rank in (0, 1) if alive(int((run_dir / f"listening-{rank}").read_text()))] == []
    assert sorted((ssh / "reached").read_text().split()) == ["worker-0", "worker-1"]


def test_hosts_that_still_save_are_not_asked_again() -> None:
    now = [0.0]
    patience = Patience(settle_s=60, grace_s=500, clock=lambda: now[0])
    patience.asked()
    now[0] = 1000.0
    assert not patience.is_over([75, None])  # the first has saved
    assert not patience.is_over([75, 1, None])  # now one has failed
    now[0] += 61
    assert patience.is_over([75, 1, None])
    now[0] += 500
    assert not patience.is_over([75, 1, None])
    now[0] += 6
    assert patience.is_over([75, 1, None])


def test_a_node_whose_ranks_agree_to_end_starts_them_no_more(ssh: Path) -> None:
    """The signal went to another node's agent: here the rank ends with 75, and a restart is left."""
    work = stand_in(ssh, ["asked"])
    agents = dataclasses.replace(agents_here(), nodes=1)
    (command,) = host_commands(agents, work, HOSTS[:1])
    agent = subprocess.Popen(command, stdin=subprocess.PIPE)
    listening = work.run_dir / "listening-0"
    until(lambda: listening.exists() and bool(listening.read_text()))
    os.kill(int(listening.read_text()), signal.SIGUSR1)
    assert agent.wait(timeout=120) == 75
    assert starts(work.run_dir) == 1


def test_a_signal_ends_the_preflight_too(ssh: Path) -> None:
    """One that waits for a node that does not come."""
    port = agents_here().port
    nodes = ["--nodes=2", f"--rdzv=127.0.0.1:{port}", "--ranks-per-node=1", f"--run-dir={ssh / 'run'}"]
    command = [sys.executable, "-m", "launch.clusters.run_agent", "preflight", BASE, *nodes, "--then"]
    agent = subprocess.Popen(command, cwd=CHECKOUT)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    until(lambda: bool(children.read_text().split()))
    (child,) = map(int, children.read_text().split())
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=60) == 75
    until(lambda: not alive(child))
    assert not alive(child)


def test_a_host_that_ssh_does_not_reach_is_named(ssh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (ssh / "bin" / "ssh").write_text('#!/bin/sh\ncase "$*" in *worker-1*) exit 255;; esac\n')
    commands = host_commands(agents_here(), stand_in(ssh, ["ok"], ["ok"]), HOSTS, ssh_port=2222)
    assert all({"BatchMode=yes", "ConnectTimeout=30", "2222"} <= set(command) for command in commands)
    assert dry_run(commands, HOSTS).splitlines()[::2] == ["# node 0: worker-0", "# node 1: worker-1"]
    assert run_hosts(commands, HOSTS, grace_s=0.0) == 1
    assert "trellis: error: worker-1: ssh cannot reach it, or lost it" in capfd.readouterr().err
