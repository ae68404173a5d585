"""Point-to-point between neighbours: does the order hold under delays, and how fast is it?

Transfers carry no tags: the n-th message sent is the n-th received, in each direction. That is what a backend
and a network between machines must give, and what these messages check by their contents.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trellis_dist.parallel.transfers import Arrival, Transfers
from trellis_dist.training.parity.compare import Failure, Findings

__all__ = ["Neighbour", "check_order", "measure_neighbour"]

MESSAGES = 400
# Receives that are posted before the oldest is waited for.
_WINDOW = 6
# Messages of one size and of many: a mix-up of equal sizes shows in the contents only.
_SIZES = (1, 7, 512, 512, 512, 4096, 65536)
_DELAYED, _LONGEST_DELAY_S = 0.1, 0.004
# Contents are whole numbers below this prime, exact in fp32.
_PRIME = 1_000_003


@dataclass(frozen=True)
class _Message:
    index: int
    rightward: bool
    size: int

    def contents(self, sender: int, device: torch.device) -> Tensor:
        """What ``sender`` sends: no two messages of a run are alike, nor two elements of one."""
        return (torch.arange(self.size, device=device) + self.mark(sender)).remainder(_PRIME).float()

    def mark(self, sender: int) -> int:
        """The first element."""
        return (sender * MESSAGES + self.index) * 17 % _PRIME

    def label(self, sender: int) -> str:
        """How reports call it."""
        return f"message {self.index} {'rightward' if self.rightward else 'leftward'} from rank {sender}"


def check_order(case: str, transfers: Transfers) -> Findings:
    """Send messages of different sizes both ways along the line with random pauses, and check what arrives.

    Every rank sends and receives in the order of one list, drawn from a seed they share; the pauses are each
    rank's own.
    """
    mesh, findings = transfers.mesh, Findings(worst={"mixed up": 0.0})
    pauses = random.Random(mesh.rank)
    posted: deque[tuple[_Message, int, Arrival]] = deque()
    for message in _messages():
        arrival, sender = _exchange(message, transfers)
        if arrival is not None and sender is not None:
            posted.append((message, sender, arrival))
        if pauses.random() < _DELAYED:
            time.sleep(pauses.uniform(0, _LONGEST_DELAY_S))
        while len(posted) > _WINDOW:
            _check(case, *posted.popleft(), findings)
    while posted:
        _check(case, *posted.popleft(), findings)
    return findings


def _messages() -> Iterator[_Message]:
    shared = random.Random(0)
    for index in range(MESSAGES):
        yield _Message(index, shared.random() < 0.5, shared.choice(_SIZES))


def _exchange(message: _Message, transfers: Transfers) -> tuple[Arrival | None, int | None]:
    """Post the receive of ``message`` and send this rank's own; what comes, and from whom.

    In two parts, as a pair of memories is sent.
    """
    mesh = transfers.mesh
    parts = message.contents(mesh.rank, mesh.device).split([1, message.size - 1])
    if message.rightward:
        arrival = transfers.expect_left(*parts)
        transfers.send_right(*parts)
        return arrival, mesh.left
    arrival = transfers.expect_right(*parts)
    transfers.send_left(*parts)
    return arrival, mesh.right


def _check(case: str, message: _Message, sender: int, arrival: Arrival, findings: Findings) -> None:
    found = torch.cat(arrival.wait())
    expected = message.contents(sender, found.device)
    if torch.equal(found, expected):
        return
    findings.worst["mixed up"] += 1
    if findings.worst["mixed up"] == 1:  # what follows is the consequence
        marks = {other.mark(sender): other for other in _messages()}
        other = marks.get(int(found[0]))
        what = other.label(sender) if other else f"other contents, from {found[0]:g}"
        failure = Failure(case=case, quantity=message.label(sender), expected="its contents", found=what)
        findings.failures.append(failure)


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """What two neighbours reach, one way: half a round trip of one number, and large messages in a row."""

    left: int
    right: int
    left_host: str
    right_host: str
    latency_us: float
    gigabytes_per_s: float


_ROUND_TRIPS, _WARM_UP = 100, 10
_LARGE, _LARGE_MESSAGES = 1 << 20, 8


def measure_neighbour(transfers: Transfers, *, right: bool) -> tuple[float, float] | None:
    """(seconds of half a round trip, bytes per second) with the right or the left neighbour, together.

    None where there is none, and on the right one of the two, which only answers.
    """
    mesh = transfers.mesh
    if (mesh.right if right else mesh.left) is None:
        return None
    one, large = (torch.zeros(size, device=mesh.device) for size in (1, _LARGE))
    if not right:
        _answer(transfers, one, large)
        return None
    trips = [_timed(lambda: _round_trip(transfers, one), mesh.device) for _ in range(_ROUND_TRIPS)]
    seconds = _timed(lambda: _many(transfers, one, large), mesh.device)
    latency = statistics.median(trips[_WARM_UP:]) / 2
    return latency, _LARGE_MESSAGES * large.numel() * large.element_size() / seconds


def _answer(transfers: Transfers, one: Tensor, large: Tensor) -> None:
    for _ in range(_ROUND_TRIPS):
        _received(transfers.expect_left(one))
        transfers.send_left(one)
    for _ in range(_LARGE_MESSAGES):
        _received(transfers.expect_left(large))
    transfers.send_left(one)


def _round_trip(transfers: Transfers, one: Tensor) -> None:
    transfers.send_right(one)
    _received(transfers.expect_right(one))


def _many(transfers: Transfers, one: Tensor, large: Tensor) -> None:
    for _ in range(_LARGE_MESSAGES):
        transfers.send_right(large)
    _received(transfers.expect_right(one))


def _received(arrival: Arrival | None) -> None:
    assert arrival is not None, "a neighbour that is there sends"
    arrival.wait()


def _timed(work: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
