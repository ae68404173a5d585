"""Whether a host has lost the network of its job, and that nothing else is taken for it."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping

import pytest

from trellis_dist.training.watch import hang, links
from trellis_dist.training.watch.hang import HangWatch
from trellis_dist.training.watch.heartbeat import Beat

linux = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked the way of Linux")
HERE, STORE_ELSEWHERE = socket.gethostname(), "203.0.113.7"  # of RFC 5737, nobody's


def test_the_loopback_and_what_is_gone_have_no_link() -> None:
    assert not links.has_link("lo")
    assert not links.has_link("gone0")


@linux
def test_an_interface_is_found_by_its_address() -> None:
    assert links.interface_of("127.0.0.1") == "lo"
    assert links.interface_of(STORE_ELSEWHERE) is None
    assert links.interface_of("no address") is None
    assert links.is_own_address("localhost")
    assert not links.is_own_address(STORE_ELSEWHERE)


def test_the_interface_of_the_job_is_the_chosen_one_then_that_of_the_name_then_of_the_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", STORE_ELSEWHERE)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setattr(links, "has_link", lambda name: name != "down0")
    monkeypatch.setattr(links, "_of_own_name", lambda: "eth0")
    monkeypatch.setattr(links, "_of_route", lambda host: f"to {host}")
    assert links.job_link() == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "down0")
    assert links.job_link() is None, "it had no link at the start: it cannot lose it"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert links.job_link() == "eth0"
    monkeypatch.setattr(links, "_of_own_name", lambda: None)
    assert links.job_link() == f"to {STORE_ELSEWHERE}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert links.job_link() is None, "the job has no other host"


@pytest.mark.parametrize(
    "store, blamed, lost, cut_off",
    [
        (STORE_ELSEWHERE, None, "eth0", True),
        (STORE_ELSEWHERE, None, "docker0", False),
        ("localhost", "host1", "eth0", True),
        ("localhost", "host1", "veth7", False),
        (STORE_ELSEWHERE, "host1", "eth0", False),  # a store on another host answered
        ("localhost", HERE, "eth0", False),  # a rank of this host is the one that hangs
        ("localhost", None, "eth0", False),  # a silent store on this host is no network's fault
    ],
)  # fmt: skip
def test_a_host_is_cut_off_by_the_loss_of_the_jobs_own_link_alone(
    store: str, blamed: str | None, lost: str, cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``blamed``: the host of the rank that fell silent; None: the store does not answer."""
    monkeypatch.setenv("MASTER_ADDR", store)
    monkeypatch.setattr(hang, "job_link", lambda: "eth0")
    monkeypatch.setattr(hang, "has_link", lambda name: name != lost)
    told: list[str] = []
    watch = HangWatch(
        rank=1,
        report=lambda message, echo: told.append(message),
        heartbeat=_Store(blamed),  # type: ignore[arg-type]
        store_rank=0,
        poll_s=0.01,
        end=lambda status: None,
    )
    watch.arm(0.02, step=3, operation="update")
    watch._thread.join(30)
    watch.close()
    (message,) = told
    assert message.endswith("itself is cut off: eth0 has no link") == cut_off
    assert ("rank 0" in message) == (not cut_off)


class _Store:
    """Of two ranks: rank 1 beats, rank 0 on ``blamed`` does not; without that nothing answers."""

    interval_s, verdict = 0.01, None

    def __init__(self, blamed: str | None) -> None:
        self._blamed, self._count = blamed, 0

    def note(self, step: int, operation: str) -> None: ...

    def close(self) -> None: ...

    def publish(self, verdict: str, limit_s: float) -> None: ...

    def claim(self, limit_s: float) -> bool | None:
        return True if self._blamed else None

    def read(self, limit_s: float) -> Mapping[int, Beat | None]:
        self._count += 1
        return {0: _beat(0, str(self._blamed), 1), 1: _beat(1, HERE, self._count)}


def _beat(rank: int, host: str, count: int) -> Beat:
    now = time.time()
    return Beat(
        rank=rank,
        host=host,
        pid=7,
        step=3,
        operation="update",
        since=now,
        count=count,
        time=now,
        ended=rank == 0,  # so that nothing is sent a signal
    )
