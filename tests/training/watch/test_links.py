"""Whether a host has lost its own network."""

from __future__ import annotations

import sys

import pytest

from trellis_dist.training.watch import links
from trellis_dist.training.watch.hang import HangWatch


def test_the_loopback_is_no_network() -> None:
    assert "lo" not in links.working_links()


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked the way of Linux")
def test_an_interface_that_is_gone_has_no_link() -> None:
    before = links.working_links()
    assert links.lost_links(before) == []
    assert links.lost_links(before | {"gone0"}) == ["gone0"]


def test_a_rank_whose_host_is_cut_off_says_so_and_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis_dist.training.watch.hang.lost_links", lambda before: ["eth0"])
    told: list[str] = []
    watch = HangWatch(
        rank=1,
        report=lambda message, echo: told.append(message),
        heartbeat=_SilentStore(),  # type: ignore[arg-type]
        store_rank=0,
        poll_s=0.01,
        end=lambda status: None,
    )
    watch.arm(0.02, step=3, operation="update")
    watch._thread.join(30)
    watch.close()
    (message,) = told
    assert message.endswith("itself is cut off: eth0 has no link")
    assert "rank 0" not in message


class _SilentStore:
    interval_s, verdict = 0.01, None

    def note(self, step: int, operation: str) -> None: ...

    def close(self) -> None: ...

    def claim(self, limit_s: float) -> bool | None:
        return None
