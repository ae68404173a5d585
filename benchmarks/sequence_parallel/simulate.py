"""A discrete-event model of a training step over sp sequence ranks: who waits for whom, and how long.

Every rank runs the program that ``parallel/sequence.py``, ``halo.py`` and the local engine run, with a time
for each stage in place of the stage:

    forward of a layer    project; halo out and in; convolve; [receive posted] arrange; wait for the state;
                          scan; state out; readout; finish
    backward of a layer   finish; [receive posted] rescan; readout; wait for the adjoint; reverse scan;
                          adjoint out; inputs; halo's gradient out and in; convolve; project

A message travels once it has been sent and its receive has been posted, and arrives ``Link.seconds`` later.
It blocks nobody but the rank that waits for it, except that a rank has at most ``window`` sends under way in
one direction (``Transfers`` waits for the oldest). Times are seconds, sizes bytes.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["INSTANT", "Link", "Outcome", "Span", "StageTimes", "Step", "efficiency", "ideal", "simulate"]


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each stage of one layer on one segment, in the order of a forward and a backward pass."""

    project: float = 0.0
    convolve: float = 0.0
    arrange: float = 0.0
    scan: float = 0.0
    readout: float = 0.0
    finish: float = 0.0
    finish_back: float = 0.0
    rescan: float = 0.0
    readout_back: float = 0.0
    scan_back: float = 0.0
    inputs_back: float = 0.0
    convolve_back: float = 0.0
    project_back: float = 0.0

    @property
    def forward(self) -> float:
        """Of one layer."""
        return self.project + self.convolve + self.arrange + self.scan + self.readout + self.finish

    @property
    def backward(self) -> float:
        """Of one layer."""
        scans = self.rescan + self.readout_back + self.scan_back + self.inputs_back
        return self.finish_back + scans + self.convolve_back + self.project_back

    def scaled(self, factor: float) -> StageTimes:
        """Every stage ``factor`` times as long."""
        return StageTimes(*(factor * seconds for seconds in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Link:
    """What a message costs: ``latency`` seconds and its bytes over ``bandwidth`` bytes a second."""

    latency: float = 0.0
    bandwidth: float = float("inf")

    def seconds(self, size: float) -> float:
        """From the moment both sides are ready until a message of ``size`` bytes is there."""
        return self.latency + size / self.bandwidth

    def all_reduce_seconds(self, size: float, ranks: int) -> float:
        """A ring: 2 (n - 1) steps, each of 1/n of the bytes."""
        return 0.0 if ranks == 1 else 2 * (ranks - 1) * self.seconds(size / ranks)


INSTANT = Link()


@dataclass(frozen=True)
class Step:
    """What is simulated.

    Attributes:
        times: of one layer on one rank's segment of a micro-batch.
        layers, sp, micro_batches: of the step.
        forwards_first: micro-batches whose forward passes run before their backward passes; 1 alternates.
        state, halo: bytes of a state (or adjoint) and of a halo; a halo of 0 bytes is not sent.
        link: between neighbours.
        gradients: seconds of the sum over the ranks at the end, in which all ranks meet.
        update: seconds of the optimizer after it.
        lock_step: all ranks also meet after each layer, as one collective a layer makes them.
        window: sends that a rank may have under way in one direction.
    """

    times: StageTimes
    layers: int
    sp: int
    micro_batches: int = 1
    forwards_first: int = 1
    state: float = 0.0
    halo: float = 0.0
    link: Link = INSTANT
    gradients: float = 0.0
    update: float = 0.0
    lock_step: bool = False
    window: int = 8


@dataclass(frozen=True)
class Span:
    """One pass of one layer on one rank: when it began, how long it waited, its (reverse) scan, its end."""

    rank: int
    micro_batch: int
    layer: int
    phase: str
    begin: float
    waited: float
    scan_begin: float
    scan_end: float
    end: float


@dataclass(frozen=True)
class Outcome:
    """A simulated step: seconds until the last rank is done, and every pass of every layer."""

    makespan: float
    spans: list[Span] = field(default_factory=list)


# What a rank does next, and with what: "work" or "scan", seconds; "send", "post" or "wait", (neighbour or
# None, kind, bytes); "drain", after a send to the neighbour; "meet" all ranks, seconds; "begin",
# (micro-batch, layer, phase); "end".
_Action = tuple[str, Any]


def ideal(step: Step) -> float:
    """Seconds of the work of one rank, without any wait or exchange."""
    return step.micro_batches * step.layers * (step.times.forward + step.times.backward) + step.update


def efficiency(step: Step) -> float:
    """Ideal over simulated time."""
    return ideal(step) / simulate(step).makespan


def simulate(step: Step) -> Outcome:
    """Run all ranks' programs; raises AssertionError if they wait for each other in a circle."""
    network = _Network(step)
    ranks = [_Rank(rank, _program(step, rank), network) for rank in range(step.sp)]
    running = ranks
    while running:
        before = sum(rank.done for rank in ranks)
        for rank in running:
            rank.advance()
        assert sum(rank.done for rank in ranks) > before, "the ranks wait for each other in a circle"
        running = [rank for rank in ranks if not rank.ended]
    return Outcome(max(rank.clock for rank in ranks), [span for rank in ranks for span in rank.spans])


def _program(step: Step, rank: int) -> Iterable[_Action]:
    left = rank - 1 if rank > 0 else None
    right = rank + 1 if rank < step.sp - 1 else None
    group = step.forwards_first
    for first in range(0, step.micro_batches, group):
        members = range(first, min(first + group, step.micro_batches))
        for micro_batch in members:
            for layer in range(step.layers):
                yield from _forward(step, (micro_batch, layer), left, right)
        for micro_batch in members:
            for layer in reversed(range(step.layers)):
                yield from _backward(step, (micro_batch, layer), left, right)
    if step.sp > 1:
        yield "meet", step.gradients
    yield "work", step.update


def _forward(step: Step, which: tuple[int, int], left: int | None, right: int | None) -> Iterator[_Action]:
    times = step.times
    yield "begin", (*which, "forward")
    yield "work", times.project
    yield from _halo(step, source=left, to=right)
    yield "work", times.convolve
    yield "post", (left, "state", step.state)
    yield "work", times.arrange
    yield "wait", (left, "state", step.state)
    yield "scan", times.scan
    yield "send", (right, "state", step.state)
    yield "drain", right
    yield "work", times.readout
    yield "work", times.finish
    yield "end", None
    if step.lock_step and step.sp > 1:
        yield "meet", step.link.latency


def _backward(step: Step, which: tuple[int, int], left: int | None, right: int | None) -> Iterator[_Action]:
    times = step.times
    yield "begin", (*which, "backward")
    yield "work", times.finish_back
    yield "post", (right, "adjoint", step.state)
    yield "work", times.rescan
    yield "work", times.readout_back
    yield "wait", (right, "adjoint", step.state)
    yield "scan", times.scan_back
    yield "send", (left, "adjoint", step.state)
    yield "drain", left
    yield "work", times.inputs_back
    yield "work", times.convolve_back
    yield from _halo(step, source=right, to=left)
    yield "work", times.project_back
    yield "end", None
    if step.lock_step and step.sp > 1:
        yield "meet", step.link.latency


def _halo(step: Step, *, source: int | None, to: int | None) -> Iterator[_Action]:
    if step.halo:
        yield "post", (source, "halo", step.halo)
        yield "send", (to, "halo", step.halo)
        yield "drain", to
        yield "wait", (source, "halo", step.halo)


class _Network:
    """What has been sent and posted so far: the n-th message of a pair and kind meets its n-th receive."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.sent: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        self.posted: dict[tuple[int, int, str], list[float]] = defaultdict(list)
        self.meetings: dict[int, dict[int, float]] = defaultdict(dict)

    def arrival(self, key: tuple[int, int, str], number: int, size: float) -> float | None:
        """When message ``number`` of ``key`` = (from, to, kind) is there; None while one side is missing."""
        sent, posted = self.sent[key], self.posted[key]
        if number >= len(sent) or number >= len(posted):
            return None
        return max(sent[number], posted[number]) + self.step.link.seconds(size)


class _Rank:
    """One rank's clock, running its program until it has to wait for another rank."""

    def __init__(self, number: int, program: Iterable[_Action], network: _Network) -> None:
        self.number, self.network = number, network
        self.clock, self.done, self.ended = 0.0, 0, False
        self.spans: list[Span] = []
        self._program = iter(program)
        self._now = next(self._program)
        self._span: dict[str, Any] = {}
        self._under_way: dict[int | None, list[tuple[tuple[int, int, str], int, float]]] = defaultdict(list)
        self._waited: dict[tuple[int, int, str], int] = defaultdict(int)
        self._met = 0

    def advance(self) -> None:
        """Act until blocked or at the end."""
        while not self.ended and getattr(self, f"_{self._now[0]}")(self._now[1]):
            self.done += 1
            following = next(self._program, None)
            self.ended = following is None
            self._now = following or self._now

    def _work(self, seconds: float) -> bool:
        self.clock += seconds
        return True

    def _begin(self, which: tuple[int, int, str]) -> bool:
        micro_batch, layer, phase = which
        self._span = {"micro_batch": micro_batch, "layer": layer, "phase": phase, "begin": self.clock}
        self._span["waited"] = 0.0
        return True

    def _scan(self, seconds: float) -> bool:
        self._span["scan_begin"], self._span["scan_end"] = self.clock, self.clock + seconds
        return self._work(seconds)

    def _end(self, _: None) -> bool:
        self.spans.append(Span(rank=self.number, end=self.clock, **self._span))
        return True

    def _post(self, message: tuple[int | None, str, float]) -> bool:
        source, kind, _ = message
        if source is not None:
            self.network.posted[source, self.number, kind].append(self.clock)
        return True

    def _wait(self, message: tuple[int | None, str, float]) -> bool:
        source, kind, size = message
        if source is None:
            return True
        key = (source, self.number, kind)
        arrival = self.network.arrival(key, self._waited[key], size)
        if arrival is None:
            return False
        self._waited[key] += 1
        self._span["waited"] += max(0.0, arrival - self.clock)
        self.clock = max(self.clock, arrival)
        return True

    def _send(self, message: tuple[int | None, str, float]) -> bool:
        to, kind, size = message
        if to is None:
            return True
        key = (self.number, to, kind)
        self._under_way[to].append((key, len(self.network.sent[key]), size))
        self.network.sent[key].append(self.clock)
        return True

    def _drain(self, to: int | None) -> bool:
        under_way = self._under_way[to]
        while len(under_way) > self.network.step.window:
            arrival = self.network.arrival(*under_way[0])
            if arrival is None:
                return False
            self.clock = max(self.clock, arrival)
            under_way.pop(0)
        return True

    def _meet(self, seconds: float) -> bool:
        arrived = self.network.meetings[self._met]
        arrived[self.number] = self.clock
        if len(arrived) < self.network.step.sp:
            return False
        self._met += 1
        self.clock = max(arrived.values()) + seconds
        return True
