"""`trellis preflight`: are all nodes fit for one job, and if not, which one differs first and in what?

Every node runs it at the same time and prints the same verdict. Cheap questions come first: how each was
started, what it says about itself, its clock, the run folder, and at last how fast they reach each other.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.nodes.folder import TOKEN_S, folder_answers, shared
from launch.nodes.limit import within
from launch.nodes.meet import Answers, Call, Meeting, Node, attend, open_door
from launch.nodes.ports import is_loopback, parse_endpoint
from launch.nodes.reach import REACH_S, Reach, probe
from launch.nodes.verdict import (
    Link,
    Problem,
    clocks,
    compare,
    failed,
    label,
    own_problems,
    same_machine,
    slow_links,
    started_alike,
)

if TYPE_CHECKING:
    from launch.recipe import Recipe

__all__ = ["MEET_S", "Local", "preflight", "render"]

MEET_S = 120.0  # for all nodes to come; those started by one script are there within seconds
FACTS_S = 120.0  # torch's import from a cold network disk
CLOCK_TRIPS, CLOCK_S = 5, 10.0
BANDWIDTH_S = 100.0  # of which ``reduce.REDUCE_S`` for the measurement
SLACK_S = 10.0  # for the answer of a node that gave up at the limit to come

Clock = Callable[[], float]
_BROKEN_OFF = {
    "passed": False,
    "problems": [
        {
            "node": None,
            "host": None,
            "what": "preflight",
            "line": "the preflight was broken off on the first node: see its terminal",
        }
    ],
    "nodes": [],
    "seconds": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Local:
    """How this node answers: what it says about itself, its run folder, its clock (unix seconds).

    ``bandwidth`` leaves the last check out when it is False.
    """

    facts: Callable[[], dict[str, Any]]
    run_dir: Path
    clock: Clock = time.time
    bandwidth: bool = True


def preflight(
    recipe: Recipe,
    run_dir: Path,
    *,
    call: Call,
    rendezvous: str,
    seconds: float = MEET_S,
    bandwidth: bool = True,
) -> dict[str, Any]:
    """Meet the other nodes at ``rendezvous`` (HOST:PORT) and compare; the same report on every node.

    Args:
        recipe, run_dir: of the job, as it will be started.
        call: how this node was started.
        seconds: to wait for the others.
        bandwidth: measure it as well.

    Returns:
        ``{"passed", "problems": [{"node", "host", "what", "line"}], "nodes": [{"host", "address", ...}],
        "seconds", and, as far as it came, "clocks", "all_reduce", "links", "node_bandwidth"}``. ``problems``
        are in the order of the nodes, what concerns all of them first; GB/s and seconds.

    Raises:
        ValueError: options that cannot be.
        launch.nodes.meet.MeetingError: this node did not reach the others, or the port is taken.
    """
    from launch.nodes.facts import facts

    local = Local(
        facts=lambda: facts(recipe, run_dir, nodes=call.nodes, ranks=call.ranks),
        run_dir=run_dir,
        bandwidth=bandwidth,
    )
    return meet(local, call=call, rendezvous=rendezvous, seconds=seconds)


def meet(local: Local, *, call: Call, rendezvous: str, seconds: float) -> dict[str, Any]:
    """``preflight`` of a node that answers as ``local`` says."""
    _check_call(call)
    host, port = parse_endpoint(rendezvous)
    answers, begin = _answers(local), time.monotonic()
    door = open_door(host, port, place=call.place, seconds=seconds)
    seconds = max(1.0, seconds - (time.monotonic() - begin))
    if door is None:
        return attend(host, port, call, answers, seconds=seconds, own=_is_here(host))
    _check_door(door, host, call)
    begin = time.monotonic()
    meeting = Meeting.open(door, call, answers, seconds=seconds)
    report: dict[str, Any] = _BROKEN_OFF
    try:
        found = _examine(meeting, local, expected=call.nodes)
        found["seconds"] = round(time.monotonic() - begin, 3)
        report = json.loads(json.dumps(found))  # as the other nodes get it
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of answers that are none
        raise ValueError(
            f"a node answered something else than it was asked ({error!r}): is it the same version?"
        ) from error
    finally:
        meeting.end(report)
    return report


def render(report: Mapping[str, Any]) -> list[str]:
    """What was found, a line each; problems are not among them."""
    nodes = report["nodes"]
    lines = [f"{len(nodes)} nodes: " + ", ".join(f"{node['host']} ({node['address']})" for node in nodes)]
    if report["passed"]:
        lines.append("equal on all: versions, source, recipe, data set, devices; the run folder is shared")
    if "clocks" in report:
        apart = max(offset for offset, _ in report["clocks"]) - min(offset for offset, _ in report["clocks"])
        error = max(error for _, error in report["clocks"])
        lines.append(f"clocks: {apart * 1e3:.1f} ms apart (+- {error * 1e3:.1f} ms)")
    if "all_reduce" in report:
        each = ", ".join(
            f"{node['host']} {speed:.2f}" for node, speed in zip(nodes, report["node_bandwidth"], strict=True)
        )
        lines.append(f"all-reduce: {report['all_reduce']:.2f} GB/s; between neighbours, GB/s: {each}")
    return lines


def _check_call(call: Call) -> None:
    for option, value in (("--nodes", call.nodes), ("--ranks-per-node", call.ranks)):
        if value < 1:
            raise ValueError(f"{option} {value}: use 1 or more")
    if call.place is not None and not 0 <= call.place < call.nodes:
        raise ValueError(f"--node-rank {call.place}: with --nodes {call.nodes} use 0 to {call.nodes - 1}")


def _is_here(host: str) -> bool:
    """Whether HOST is an address of this machine."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as trial:
            trial.bind((address[4][0], 0))
    except OSError:
        return False
    return True


def _check_door(door: socket.socket, host: str, call: Call) -> None:
    """Refuse a name of this node that other nodes do not find it by."""
    address = str(door.getsockname()[0])
    if call.nodes > 1 and is_loopback(address) and host != "localhost" and not is_loopback(host):
        door.close()
        raise ValueError(
            f"--rdzv {host} is {address} on {call.host} itself, where no other node comes: give the address "
            "of its network, or take the name off that line of /etc/hosts"
        )


def _answers(local: Local) -> Answers:
    def measure(details: Mapping[str, Any]) -> dict[str, Any]:
        from launch.nodes.reduce import measure

        return measure(
            details["rank"],
            details["count"],
            host=details["host"],
            port=details["port"],
            cuda=details["cuda"],
        )

    asked = {
        "facts": (lambda _: local.facts(), FACTS_S),
        "clock": (lambda _: {"time": local.clock()}, CLOCK_S),
        "bandwidth": (measure, BANDWIDTH_S),
    }
    asked |= {name: (answer, TOKEN_S + SLACK_S) for name, answer in folder_answers(local.run_dir).items()}
    asked |= {name: (answer, REACH_S) for name, answer in Reach().answers().items()}
    return {name: _safe(answer, seconds) for name, (answer, seconds) in asked.items()}


def _safe(
    answer: Callable[[Mapping[str, Any]], dict[str, Any]], seconds: float
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """An answer, or the line of what kept this node from giving it within ``seconds``."""

    def answered(details: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return within(lambda: answer(details), seconds)
        except TimeoutError as error:  # without an import: the one that hangs may hold its lock
            return {"failed": f"{error}: look at its GPUs (nvidia-smi) and the file systems it mounts (df)"}
        except Exception as error:
            from launch.worker import error_line

            return {"failed": error_line(error).splitlines()[0]}

    return answered


def _examine(meeting: Meeting, local: Local, *, expected: int) -> dict[str, Any]:
    """Ask until something is wrong."""
    calls = [vars(node.call) for node in meeting.nodes]
    problems = started_alike(calls, expected=expected)
    found: dict[str, Any] = {}
    problems = problems or same_machine([(node.call.host, node.address) for node in meeting.nodes])
    for check in (_facts, _clocks, _shared, _bandwidth):
        if problems or (check is _bandwidth and (not local.bandwidth or expected == 1)):
            break
        problems, more = check(meeting, local, found)
        found |= more
    nodes = [{"host": node.call.host, "address": node.address} for node in meeting.nodes]
    for node, more in zip(nodes, found.pop("facts", [{}] * len(nodes)), strict=True):
        node |= {key: value for key, value in more.items() if key not in ("host", "recipe")}
    return {"passed": not problems, "problems": _listed(problems, meeting.nodes), "nodes": nodes, **found}


def _listed(problems: Sequence[Problem], nodes: Sequence[Node]) -> list[dict[str, Any]]:
    listed = []
    for problem in problems:
        of = nodes[problem.node] if problem.node is not None else None
        who = f"{label(problem.node, of.call.host, of.address)}: " if of and problem.node is not None else ""
        host = of.call.host if of else None
        listed.append(
            {"node": problem.node, "host": host, "what": problem.what, "line": who + problem.message}
        )
    return listed


Found = tuple[list[Problem], dict[str, Any]]


def _facts(meeting: Meeting, _: Local, __: Mapping[str, Any]) -> Found:
    answers = meeting.ask("facts", seconds=FACTS_S + SLACK_S)
    problems = failed(answers, "what it says about itself") or own_problems(answers) or compare(answers)
    return problems, {} if any("failed" in answer for answer in answers) else {"facts": answers}


def _clocks(meeting: Meeting, local: Local, _: Mapping[str, Any]) -> Found:
    """The best of a few round trips to each node: its clock was read somewhere in the trip."""
    offsets = []
    for place, node in enumerate(meeting.nodes):
        try:
            offsets.append(
                min((_offset(meeting, node, local.clock) for _ in range(CLOCK_TRIPS)), key=lambda of: of[1])
            )
        except (OSError, ValueError) as error:
            return [Problem(node=place, what="clock", message=f"it stopped answering ({error})")], {}
    return clocks(offsets), {"clocks": offsets}


def _offset(meeting: Meeting, node: Node, clock: Clock) -> tuple[float, float]:
    before = clock()
    answer = meeting.round_trip(node, "clock", seconds=CLOCK_S + SLACK_S)
    if "failed" in answer:
        raise ValueError(answer["failed"])
    theirs = float(answer["time"])
    after = clock()
    return (theirs - (before + after) / 2, (after - before) / 2)


def _shared(meeting: Meeting, _: Local, __: Mapping[str, Any]) -> Found:
    return shared(meeting), {}


def _bandwidth(meeting: Meeting, _: Local, found: Mapping[str, Any]) -> Found:
    from launch.nodes.reduce import keep_store

    store, count = keep_store(), len(meeting.nodes)
    cuda = all(facts["devices"] for facts in found["facts"])
    about = {"count": count, "host": meeting.nodes[0].address, "port": store.port, "cuda": cuda}
    answers = meeting.ask(
        "bandwidth", seconds=BANDWIDTH_S + SLACK_S, details=[{**about, "rank": rank} for rank in range(count)]
    )
    problems = failed(answers, "all-reduce between the nodes")
    if problems:  # one node is enough to fail them all: find out which
        return probe(meeting) or _of_nobody(problems), {}
    links: list[Link] = [
        (int(a), int(b), float(speed)) for answer in answers for a, b, speed in answer["links"]
    ]
    best, slow = slow_links(links, count)
    speed = min(float(answer["all_reduce"]) for answer in answers)
    return slow, {"all_reduce": speed, "links": links, "node_bandwidth": best}


def _of_nobody(problems: Sequence[Problem]) -> list[Problem]:
    """A failure of nodes that reach each other: where several have it, its cause cannot be told from here."""
    first = problems[0]
    if len(problems) == 1:
        return [first]
    line = f"{first.message} (on {len(problems)} nodes, which reach each other)"
    return [Problem(node=None, what=first.what, message=line)]
