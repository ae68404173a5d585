"""Ranks and agents that do not come together: torch's own errors, as one line with the remedy."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from launch.failures import Failure, address_of, cause_of, log_folder, lost_addresses
from launch.nodes.errors import endpoint_of, network_line, refuse_taken_port
from launch.nodes.ports import holder_of
from launch.training_run import _silent_ranks
from launch.worker import error_line
from trellis_dist.parallel import env
from trellis_dist.training.errors import CUT_OFF, SILENT_STORE
from trellis_dist.training.watch.status_page import StatusPage, status_path

LISTEN = """
import socket, sys
door = socket.create_server(("127.0.0.1", 0))
print(door.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listener(*words: str) -> Iterator[tuple[int, int]]:
    """Another program that listens: its port and process."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
        process.kill()


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def as_rank(rank: int, port: int, monkeypatch: pytest.MonkeyPatch, *, host: str = "127.0.0.1") -> str:
    """The line of a rank that starts and does not get far."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(env, "CONNECT_S", 1.0)
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError) as failed:
        env.init_distributed("cpu")
    return error_line(failed.value)


def test_a_taken_port_is_named_with_the_process_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as (port, pid):
        line = as_rank(0, port, monkeypatch)
        assert re.fullmatch(
            rf"port {port} of 127\.0\.0\.1 is in use by process {pid} \(python[\d.]*\): end it, or give "
            "every node another port",
            line,
        ), line
        with pytest.raises(OSError, match=rf"port {port} of 127.0.0.1 is in use by process {pid} "):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)
    assert holder_of(port) == ""


def test_another_agent_of_the_job_may_have_the_port() -> None:
    with listener("torch.distributed.run") as (port, _):
        refuse_taken_port("127.0.0.1", port)


@pytest.mark.parametrize(
    "host, why, remedy",
    [
        ("127.0.0.1", "refused", "start the same command on that node too"),
        ("no-such-host.invalid", "name not known", "give the first node by an address"),
    ],
)
def test_a_master_that_is_not_reached_is_said_with_the_reason(
    host: str, why: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    line = as_rank(1, port, monkeypatch, host=host)
    assert f"cannot reach {host}:{port} ({why}; tried for 1 s): {remedy}" in line
    assert len(line.splitlines()) == 1


def test_ranks_that_do_not_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    line = as_rank(0, port, monkeypatch)
    assert line.startswith(f"1 of 2 ranks came to 127.0.0.1:{port}: look whether the others were started")


def test_an_agent_that_waits_in_vain_says_what_to_do() -> None:
    assert (network_line(RendezvousTimeoutError()) or "").startswith(
        "not all nodes came in time: start the same"
    )
    assert (network_line(RendezvousClosedError()) or "").startswith(
        "the other nodes have ended this job: see"
    )
    wrapped = RuntimeError("see inner exception")
    wrapped.__cause__ = RendezvousTimeoutError()
    assert network_line(wrapped) == network_line(RendezvousTimeoutError())
    left = RendezvousConnectionError("The connection to the C10d store has failed.")
    assert (network_line(left) or "").startswith(
        "the first node, where the nodes meet, has left: its terminal"
    )
    assert network_line(KeyError("x")) is None


def test_the_place_where_agents_meet_is_read_from_their_options() -> None:
    assert endpoint_of(["--rdzv-backend=c10d", "--rdzv-endpoint=h:29500", "-m", "x"]) == ("h", 29500)
    assert endpoint_of(["--master-addr=h", "--master-port=1", "-m", "x"]) == ("h", 1)
    assert endpoint_of(["--standalone", "-m", "x"]) is None


def test_a_store_that_is_made_in_time_is_no_error() -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1)
    )  # type: ignore[attr-defined]
    refuse_taken_port("127.0.0.1", free_port())
    assert store.port > 0


def test_what_a_rank_found_that_is_cut_off_counts_after_what_others_say() -> None:
    here = "no progress on rank {} (step 9, update: more than 10 s)"
    cut = Failure(
        rank=1, message=f"{here.format(1)}: {CUT_OFF} h1 itself is cut off: eth0 has no link", detail="", at=1
    )
    silent = Failure(rank=2, message=f"{here.format(2)}: {SILENT_STORE} does not answer: x", detail="", at=2)
    heard = Failure(rank=0, message=f"{here.format(0)}: rank 1 has not been heard of", detail="", at=3)
    assert cause_of([cut, silent, heard]) is heard
    assert cause_of([cut, silent]) is cut


def test_of_silent_ranks_the_one_whose_connection_was_lost_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = {"h0": "10.0.0.1", "h1": "10.0.0.2", "h2": "10.0.0.3"}
    monkeypatch.setenv("WORLD_SIZE", "3")
    log_folder(tmp_path).mkdir()
    for rank, host in enumerate(hosts):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        page = StatusPage(status_path(log_folder(tmp_path), rank), rank=rank)
        page.write(step=7, operation="update")
        page.close()
    monkeypatch.setattr(socket, "gethostbyname", hosts.__getitem__)
    assert address_of(tmp_path, 2) == "10.0.0.3"
    assert address_of(tmp_path, 3) is None
    words = "lost the connection to another rank (Read error [10.0.0.3]:26762: Connection reset by peer)"
    assert lost_addresses([words]) == {"10.0.0.3"}
    spoke = [Failure(rank=0, message=words, detail="", echo=True)]
    assert _silent_ranks(spoke, tmp_path) == "; no word from rank 2 on h2 in step 7, update"
    unknown = [Failure(rank=0, message="lost the connection", detail="", echo=True)]
    assert "rank 1 on h1" in _silent_ranks(unknown, tmp_path)
    assert "rank 2 on h2" in _silent_ranks(unknown, tmp_path)
