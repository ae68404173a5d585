"""Which pairs of nodes do not reach each other? Asked when what needs all of them has failed.

Each node listens on a port for some seconds, at which nothing is said, and the others connect to it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.nodes.meet import Meeting
from launch.nodes.verdict import Problem, unreached

__all__ = ["CONNECT_S", "REACH_S", "Reach", "probe"]

CONNECT_S = 5.0  # to one node; all are tried at once
REACH_S = 2 * CONNECT_S
SLACK_S = 10.0  # for the answer of a node that gave up at the limit to come


class Reach:
    """A node's part in it: ``listen``, ``reach`` the others' ports, ``close``."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._door: socket.socket | None = None

    def answers(self) -> dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]]:
        """To the three questions."""
        return {
            "listen": lambda _: self._listen(),
            "reach": lambda details: {"reached": _reach_all(details["peers"])},
            "close": lambda _: self._close(),
        }

    def _listen(self) -> dict[str, Any]:
        self._door = socket.create_server(("", 0), backlog=1024)
        return {"port": self._door.getsockname()[1]}

    def _close(self) -> dict[str, Any]:
        if self._door is not None:
            self._door.close()
        return {}


def _reach_all(peers: Sequence[tuple[str, int]]) -> list[bool]:
    reached = [False] * len(peers)

    def attempt(index: int) -> None:
        reached[index] = _connects(str(peers[index][0]), int(peers[index][1]))

    attempts = [threading.Thread(target=attempt, args=(index,), daemon=True) for index in range(len(peers))]
    for thread in attempts:
        thread.start()
    for thread in attempts:
        thread.join(CONNECT_S + 1.0)
    return list(reached)


def _connects(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), timeout=CONNECT_S).close()
        return True
    return False


def probe(meeting: Meeting) -> list[Problem]:
    """The nodes that others do not reach; the pairs where it cannot be told whose fault it is."""
    count = len(meeting.nodes)
    try:
        ports = [int(answer.get("port", 0)) for answer in meeting.ask("listen", seconds=2 * SLACK_S)]
        peers = [[node.address, port] for node, port in zip(meeting.nodes, ports, strict=True)]
        answers = meeting.ask("reach", seconds=REACH_S + SLACK_S, details=[{"peers": peers}] * count)
    finally:
        meeting.ask("close", seconds=2 * SLACK_S)
    reached = [list(answer.get("reached", [False] * count)) for answer in answers]
    hosts = [f"node {place} ({node.call.host})" for place, node in enumerate(meeting.nodes)]
    return unreached(reached, hosts)
