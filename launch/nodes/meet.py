"""Where the nodes of a preflight meet: the node that has HOST asks, the others answer, all hear one verdict.

    the node with HOST:  Meeting.open() ... ask("facts", ...) ... end(verdict)
    every other node:    attend(answers) -> verdict

The door is open on the one address that was named, and only until every node has come. Strangers who come
through it hold nobody up: each has its own few seconds to say who it is.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.nodes.channel import Channel
from launch.nodes.ports import port_in_use, unreachable, why_unreachable

__all__ = ["Answers", "Call", "Meeting", "MeetingError", "Node", "attend", "open_door"]

PROTOCOL = "trellis preflight 1"
GREETING_S = 5.0  # for a stranger to say who it is, and for the door to say that it is one
PAUSE_S = 0.5  # between two attempts to reach the door
PATIENCE_S = 300.0  # for one question, whatever the others do
MOST_STRANGERS = 64  # who may be asked who they are at one time

# What a node answers to each question: name -> function of the question's details.
Answers = Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]


class MeetingError(OSError):
    """The nodes did not come together; one line with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """How this node was started: ``nodes`` in all, ``ranks`` on each, its ``place`` (None: any), its name."""

    nodes: int
    ranks: int
    place: int | None
    host: str

    def hello(self) -> dict[str, Any]:
        """As its first words."""
        return {"protocol": PROTOCOL, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One of those who came: how it was started, its address, the way to it (None: this one)."""

    call: Call
    address: str
    channel: Channel | None


def open_door(host: str, port: int, *, place: int | None, seconds: float) -> socket.socket | None:
    """Listen on HOST:PORT if that is an address of this node; None if it is another node's.

    A name that is not known is looked up again for ``seconds``: that of a pod appears late.

    Raises:
        MeetingError: it is this node's and cannot be used, or it must be (``place`` 0) and is not; no such
            name.
    """
    if place:  # another node is the first, though it may be one of this machine
        return None
    family, kind, protocol, _, address = _look_up(host, port, seconds)[0]
    door = socket.socket(family, kind, protocol)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen(MOST_STRANGERS)
        return door
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRNOTAVAIL and place != 0:
            return None
        if error.errno == errno.EADDRNOTAVAIL:
            raise MeetingError(
                f"{host} is no address of {socket.gethostname()}, which was started with --node-rank 0: give "
                "every node the address of the first one"
            ) from None
        if error.errno == errno.EADDRINUSE and place is None:
            return None  # perhaps by another node of this job on the same machine, which attend() finds out
        if error.errno == errno.EADDRINUSE:
            raise MeetingError(port_in_use(host, port)) from None
        raise MeetingError(
            f"{host}:{port} cannot be listened on ({error.strerror}): use another port"
        ) from None


def _look_up(host: str, port: int, seconds: float) -> list[Any]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                why = why_unreachable(error)
                raise MeetingError(unreachable(host, port, why, seconds=seconds)) from None
        time.sleep(min(PAUSE_S, max(0.0, deadline - time.monotonic())))


class Meeting:
    """The side of the node that has HOST."""

    def __init__(self, nodes: Sequence[Node], answers: Answers) -> None:
        """``nodes`` in their order, this one (whose ``answers`` are given) among them."""
        self.nodes, self._answers = list(nodes), answers

    @classmethod
    def open(cls, door: socket.socket, call: Call, answers: Answers, *, seconds: float) -> Meeting:
        """Wait up to ``seconds`` for the others; fewer than ``call.nodes`` may have come.

        It ends sooner when somebody was started for another number of nodes, or for a place that is taken.
        """
        own = Node(call=call, address=str(door.getsockname()[0]), channel=None)
        came, arrivals = [own], _Arrivals(door)
        deadline = time.monotonic() + seconds
        while len(came) < call.nodes and not _dispute(came):
            node = arrivals.next(deadline)
            if node is None:
                break
            came.append(node)
        arrivals.close()
        ranked = all(node.call.place is not None for node in came)
        others = sorted(
            came[1:], key=lambda node: (node.call.place if ranked else 0, node.address, node.call.host)
        )
        return cls(
            sorted([own, *others], key=lambda node: node.call.place or 0) if ranked else [own, *others],
            answers,
        )

    def ask(
        self, question: str, *, seconds: float, details: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """Ask all nodes at once; their answers in order, ``{"failed": why}`` for a node that gave none.

        Args:
            question: one that every node has an answer for.
            seconds: to wait for all.
            details: of the question, for each node.
        """
        deadline = time.monotonic() + seconds
        given = details or [{}] * len(self.nodes)
        answers: list[dict[str, Any]] = [{"failed": "timed out"} for _ in self.nodes]

        def ask(place: int) -> None:
            try:
                answers[place] = self._ask(self.nodes[place], question, dict(given[place]), deadline)
            except (OSError, ValueError) as error:
                answers[place] = {"failed": why_unreachable(error)}

        asked = [threading.Thread(target=ask, args=(place,), daemon=True) for place in range(len(answers))]
        for thread in asked:
            thread.start()
        for thread in asked:  # this node's own answer may take longer: then it is left to its thread
            thread.join(max(0.0, deadline - time.monotonic()) + 1.0)
        return list(answers)

    def round_trip(
        self, node: Node, question: str, *, seconds: float, details: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Ask one node. Raises OSError or ValueError."""
        return self._ask(node, question, dict(details or {}), time.monotonic() + seconds)

    def end(self, verdict: Mapping[str, Any]) -> None:
        """Tell every node the verdict; who is gone does not hear it."""
        for node in self.nodes:
            if node.channel is not None:
                with contextlib.suppress(OSError):
                    node.channel.send({"verdict": verdict}, deadline=time.monotonic() + GREETING_S)
                node.channel.close()

    def _ask(self, node: Node, question: str, details: dict[str, Any], deadline: float) -> dict[str, Any]:
        if node.channel is None:
            return dict(self._answers[question](details))
        node.channel.send({"question": question, "details": details}, deadline=deadline)
        return node.channel.receive(deadline=deadline)


def _dispute(came: Sequence[Node]) -> bool:
    """Whether waiting longer is of no use."""
    places = [node.call.place for node in came if node.call.place is not None]
    return len({node.call.nodes for node in came}) > 1 or len(set(places)) < len(places)


class _Arrivals:
    """Those who come through the door and say who they are, each asked in a thread of its own."""

    def __init__(self, door: socket.socket) -> None:
        self._door, self._came = door, queue.Queue[Node]()
        self._asked = threading.Semaphore(MOST_STRANGERS)
        self._thread = threading.Thread(target=self._listen, name="trellis-door", daemon=True)
        self._thread.start()

    def next(self, deadline: float) -> Node | None:
        """The next one; None when nobody comes before ``deadline``."""
        with contextlib.suppress(queue.Empty):
            return self._came.get(timeout=max(0.0, deadline - time.monotonic()))
        return None

    def close(self) -> None:
        """Close the door: also what waits behind it is turned away."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._door.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._door.accept()
            except OSError:  # closed
                return
            if self._asked.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _greet(self, connection: socket.socket) -> None:
        channel = Channel(connection)
        try:
            deadline = time.monotonic() + GREETING_S
            call = _call(channel.receive(deadline=deadline))
            address = channel.there
            channel.send({"protocol": PROTOCOL}, deadline=deadline)
            self._came.put(Node(call=call, address=address, channel=channel))
        except (OSError, ValueError):  # a stranger, or a node that has gone again
            channel.close()
        finally:
            self._asked.release()


def _call(hello: Mapping[str, Any]) -> Call:
    if hello.get("protocol") != PROTOCOL:
        raise ValueError("another protocol")
    nodes, ranks, place, host = (hello.get(key) for key in ("nodes", "ranks", "place", "host"))
    counts = isinstance(nodes, int) and isinstance(ranks, int) and isinstance(place, int | None)
    if not counts or not isinstance(host, str):
        raise ValueError("no node's first words")
    return Call(nodes=nodes, ranks=ranks, place=place, host=_plain(host))  # type: ignore[arg-type]


def _plain(text: str) -> str:
    """A name as it can be printed on a terminal."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:64])


def attend(
    host: str, port: int, call: Call, answers: Answers, *, seconds: float, own: bool = False
) -> dict[str, Any]:
    """Reach the node that has HOST within ``seconds``, answer what it asks, and return its verdict.

    Args:
        own: HOST is an address of this machine, so that what does not answer there is in the way.

    Raises:
        MeetingError: it was not reached, or left.
    """
    channel = _reach(host, port, call, seconds=seconds, own=own)
    patience = seconds  # until all have come
    try:
        while True:
            message = channel.receive(deadline=time.monotonic() + patience + PATIENCE_S)
            if "verdict" in message:
                return dict(message["verdict"])
            answer = answers[message["question"]](message.get("details", {}))
            channel.send(answer, deadline=time.monotonic() + GREETING_S)
            patience = 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeetingError(
            f"{host}:{port}, where the nodes meet, left before the verdict ({why_unreachable(error)}): "
            "see what its terminal says, and start every node again"
        ) from None
    finally:
        channel.close()


def _reach(host: str, port: int, call: Call, *, seconds: float, own: bool) -> Channel:
    deadline, why = time.monotonic() + seconds, "timed out"
    while time.monotonic() < deadline:
        until = min(deadline, time.monotonic() + GREETING_S)
        try:
            return _knock(host, port, call, until)
        except _StrangerError as error:
            if own:
                raise MeetingError(port_in_use(host, port)) from None
            why = str(error)
        except OSError as error:
            why = why_unreachable(error)
        time.sleep(min(PAUSE_S, max(0.0, deadline - time.monotonic())))
    raise MeetingError(unreachable(host, port, why, seconds=seconds))


class _StrangerError(Exception):
    """Somebody answers who is no preflight."""


def _knock(host: str, port: int, call: Call, deadline: float) -> Channel:
    """Come through the door; the answer tells a preflight from a stranger."""
    channel = Channel(socket.create_connection((host, port), timeout=max(0.01, deadline - time.monotonic())))
    try:
        until = time.monotonic() + GREETING_S
        channel.send(call.hello(), deadline=until)
        if channel.receive(deadline=until).get("protocol") != PROTOCOL:
            raise _StrangerError("another program answers there, or another version of this one")
        return channel
    except ConnectionResetError:  # the door was being closed, or a preflight ended
        channel.close()
        raise
    except (OSError, ValueError) as error:
        channel.close()
        raise _StrangerError("what listens there does not answer as a preflight") from error
    except _StrangerError:
        channel.close()
        raise
