"""Which node differs, and in what: pure functions of what the nodes said."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.recipe import differences
from trellis_dist.files import canonical_json

__all__ = [
    "CLOCK_LIMIT_S",
    "SLOW",
    "Problem",
    "clocks",
    "compare",
    "failed",
    "label",
    "own_problems",
    "same_machine",
    "slow_links",
    "started_alike",
    "unreached",
]

# The record of a failed rank has its node's time, and the earliest of all is the cause. Ranks wait 3 s for
# each other's records: with clocks further apart than this an effect is taken for the cause.
CLOCK_LIMIT_S = 2.0
SLOW = 0.5  # of the median of all nodes: a lane of a link is lost, or a port has fallen back to a lower speed
NAMED = 4  # values that one line lists

Facts = Mapping[str, Any]
Link = tuple[int, int, float]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a node (by its place in the order of nodes), or with all (None)."""

    node: int | None
    what: str
    message: str


def label(node: int, host: str, address: str) -> str:
    """How messages call a node."""
    return f"node {node} ({host}, {address})"


def started_alike(calls: Sequence[Facts], *, expected: int) -> list[Problem]:
    """Were the nodes that came started with the same numbers, for places of their own, and are they all here?

    Args:
        calls: ``nodes``, ``ranks``, ``place`` of each.
        expected: nodes of the job.
    """
    for option, key in (("--nodes", "nodes"), ("--ranks-per-node", "ranks")):
        found = _odd([call[key] for call in calls], option)
        if found:
            remedy = f"start every node with the same {option}"
            return [Problem(node=node, what=option, message=f"{line}: {remedy}") for node, line in found]
    places = [call["place"] for call in calls]
    for node, place in enumerate(places):
        if place is not None and place in places[:node]:
            taken = f"--node-rank {place}, as another node has"
            line = f"{taken}: give every node its own, 0 to {expected - 1}"
            return [Problem(node=node, what="--node-rank", message=line)]
    if len(calls) < expected:
        return [Problem(node=None, what="nodes", message=_missing(calls, expected))]
    return []


def _missing(calls: Sequence[Facts], expected: int) -> str:
    came = ", ".join(call["host"] for call in calls)
    places = {call["place"] for call in calls}
    absent = [str(place) for place in range(expected) if place not in places] if None not in places else []
    who = f"; --node-rank {', '.join(absent)} did not" if absent else ""
    return (
        f"{len(calls)} of {expected} nodes came ({came}){who}: start the same command on the others too, and "
        "see there whether they reach this node"
    )


def same_machine(places: Sequence[tuple[str, str]]) -> list[Problem]:
    """Nodes that are another one's machine, by (host, address): its processes are ranks of one node."""
    line = (
        "it is on the same machine as node {}: start the command once on each machine, with --ranks-per-node "
        "for its processes"
    )
    return [
        Problem(node=node, what="machine", message=line.format(places.index(place)))
        for node, place in enumerate(places)
        if place in places[:node]
    ]


def failed(answers: Sequence[Facts], what: str) -> list[Problem]:
    """Nodes that gave no answer."""
    return [
        Problem(node=node, what=what, message=f"{what}: {answer['failed']}")
        for node, answer in enumerate(answers)
        if "failed" in answer
    ]


def own_problems(answers: Sequence[Facts]) -> list[Problem]:
    """What nodes say against themselves; what all say is nobody's."""
    common = set.intersection(*(set(answer["problems"]) for answer in answers))
    shared = [line for line in answers[0]["problems"] if line in common]
    return [
        *(Problem(node=None, what="every node", message=line) for line in shared),
        *(
            Problem(node=node, what="node", message=line)
            for node, answer in enumerate(answers)
            for line in answer["problems"]
            if line not in common
        ),
    ]


def compare(answers: Sequence[Facts]) -> list[Problem]:
    """Nodes that differ from most in their versions, sources, recipe, data or devices; in order of nodes."""
    problems = [
        *_versions(answers),
        *_plain(answers, "source", "this project's source", "check out the same commit on every node"),
        *_recipes(answers),
        *_plain(
            answers, "data", "data set", "put the data set on a file system that all nodes share, or copy it"
        ),
        *_devices(answers),
    ]
    return sorted(problems, key=lambda problem: -1 if problem.node is None else problem.node)


def _versions(answers: Sequence[Facts]) -> list[Problem]:
    found = []
    tables = [_named_versions(answer) for answer in answers]
    for name in sorted({name for table in tables for name in table}):
        for node, line in _odd([table.get(name, "not installed") for table in tables], name):
            remedy = "install the same on every node (launch/setup.sh)"
            found.append(Problem(node=node, what=name, message=f"{line}: {remedy}"))
    return found


def _named_versions(answer: Facts) -> dict[str, str]:
    names = {"python": "python", "cuda": "CUDA", "driver": "NVIDIA driver", "nccl": "NCCL"}
    return {**answer["packages"], **{name: answer[key] for key, name in names.items()}}


def _plain(answers: Sequence[Facts], key: str, name: str, remedy: str) -> list[Problem]:
    """Digests that differ; a node without one has said why."""
    values = [answer[key] for answer in answers]
    if None in values:
        return []
    odd = _odd([str(value)[:12] for value in values], name)
    return [Problem(node=node, what=name, message=f"{line}: {remedy}") for node, line in odd]


def _recipes(answers: Sequence[Facts]) -> list[Problem]:
    found = []
    texts = [canonical_json(answer["recipe"]) for answer in answers]
    usual = _usual(texts)
    model = answers[texts.index(usual)]["recipe"]
    for node, answer in enumerate(answers):
        changed = differences(model, answer["recipe"])
        if changed:
            listed = [f"{key} {theirs!r}, not {ours!r}" for key, (ours, theirs) in sorted(changed.items())]
            more = f", and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
            line = f"another recipe: {', '.join(listed[:NAMED])}{more}"
            remedy = "start every node with the same recipe and the same --set"
            found.append(Problem(node=node, what="recipe", message=f"{line}: {remedy}"))
    return found


def _devices(answers: Sequence[Facts]) -> list[Problem]:
    odd = _odd([_show_devices(answer["devices"]) for answer in answers], "devices:")
    remedy = "use nodes with the same devices, and look at nvidia-smi where some are missing"
    return [Problem(node=node, what="devices", message=f"{line}: {remedy}") for node, line in odd]


def _show_devices(devices: Sequence[Facts]) -> str:
    counts = Counter((device["name"], round(device["memory"] / 2**30)) for device in devices)
    return ", ".join(f"{count} x {name} ({gib} GiB)" for (name, gib), count in counts.items()) or "no GPU"


def clocks(offsets: Sequence[tuple[float, float]]) -> list[Problem]:
    """Nodes whose clock is off.

    Args:
        offsets: of each node, seconds that its clock is ahead of the first node's, and how far that may be
            wrong (half a round trip).
    """
    middle = statistics.median_low(offset for offset, _ in offsets)
    return [
        Problem(
            node=node,
            what="clock",
            message=f"its clock is {abs(offset - middle):.1f} s "
            f"{'ahead of' if offset > middle else 'behind'} the others' (measured to {error:.3f} s, "
            f"{CLOCK_LIMIT_S:g} s are allowed): let NTP set it (chronyc, timedatectl)",
        )
        for node, (offset, error) in enumerate(offsets)
        if abs(offset - middle) - error > CLOCK_LIMIT_S
    ]


def slow_links(links: Sequence[Link], count: int) -> tuple[list[float], list[Problem]]:
    """The GB/s of each node, and the nodes far below the median.

    A node's is the better of its two links: a slow node spoils both of its own, and only one of each
    neighbour's. Of two nodes neither can be named, since they have one link.

    Args:
        links: (node, node, GB/s) around the ring of nodes.
        count: of nodes.
    """
    best = [
        max((speed for left, right, speed in links if node in (left, right)), default=0.0)
        for node in range(count)
    ]
    middle = statistics.median(best)
    return best, [
        Problem(
            node=node,
            what="bandwidth",
            message=f"{speed:.3g} GB/s with its neighbours, the median of the nodes is {middle:.3g}: look at "
            "its network card, cable and switch port (ethtool, ibstat), and at what else uses them",
        )
        for node, speed in enumerate(best)
        if speed < SLOW * middle
    ]


def unreached(reached: Sequence[Sequence[bool]], nodes: Sequence[str]) -> list[Problem]:
    """Nodes without a way to or from most others, if they explain all that fails; else pairs, of nobody.

    Args:
        reached: ``reached[a][b]``: node a could connect to node b.
        nodes: how each is called.
    """
    count = len(reached)
    ways = {
        a: {b for b in range(count) if a != b and not (reached[a][b] and reached[b][a])} for a in range(count)
    }
    odd = [a for a, missing in ways.items() if 2 * len(missing) > count - 1]
    remedy = "look at the firewalls between them, which must let every port pass, and at their routes"
    told = all(a in odd or b in odd for a, missing in ways.items() for b in missing)
    if odd and told and 2 * len(odd) < count:
        line = f"{{}} of {count - 1} nodes do not reach it, or it does not reach them: {remedy}"
        return [Problem(node=a, what="network", message=line.format(len(ways[a]))) for a in odd]
    pairs = [(a, b) for a, missing in ways.items() for b in sorted(missing) if a < b]
    return [
        Problem(node=None, what="network", message=f"no way between {nodes[a]} and {nodes[b]}: {remedy}")
        for a, b in pairs[:NAMED]
    ]


def _odd(values: Sequence[Hashable], name: str) -> list[tuple[int, str]]:
    """Places of the values that most do not have, each with a line that says both."""
    usual = _usual(values)
    most = Counter(values)[usual]
    others = "the other node has" if len(values) == 2 else f"{most} of {len(values)} nodes have"
    return [
        (node, f"{name} {value}, {others} {usual}") for node, value in enumerate(values) if value != usual
    ]


def _usual(values: Sequence[Hashable]) -> Any:
    """What most have; between equals, the one that the first node of them has."""
    counts = Counter(values)
    return max(values, key=lambda value: counts[value])
