"""Transfers: communicators made at construction, messages that outlive the sender, CUDA streams."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.parallel.cases import mesh_of, ranks
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.transfers import Transfers


def construction() -> tuple[list[tuple[str, int, bool]], list[tuple[str, int, bool]]]:
    """What constructing does and what it should, as (what, neighbour, whether over the rightward group)."""
    mesh = mesh_of(4)
    events: list[tuple[str, int, bool]] = []

    def noted(name: str, peer: str) -> Any:
        real = getattr(dist, name)

        def call(buffer: torch.Tensor, **kwargs: Any) -> Any:
            events.append((name, kwargs[peer], kwargs["group"] is mesh.rightward))
            return real(buffer, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", noted("isend", "dst"))
        patch.setattr(dist, "irecv", noted("irecv", "src"))
        Transfers(mesh)
    dist.barrier()
    rightward = [("irecv", mesh.left, True), ("isend", mesh.right, True)]
    leftward = [("irecv", mesh.right, False), ("isend", mesh.left, False)]
    return events, [event for event in rightward + leftward if event[1] is not None]


def test_each_direction_carries_one_element_along_the_line_at_construction():
    for events, expected in ranks().run(construction):
        assert events == expected


def message_of_dropped_transfers() -> bool:
    """The sender is gone, and its memory used again, before the neighbour asks for the message."""
    mesh, message = mesh_of(2), torch.arange(2.0**18)
    transfers = Transfers(mesh)
    transfers.send_right(message + 1)
    if mesh.right is not None:
        del transfers
        gc.collect()
        overwriting = [torch.zeros_like(message) for _ in range(8)]
    dist.barrier()
    arrived = True
    if mesh.left is not None:
        (received,) = transfers.expect_left(message).wait()
        arrived = torch.equal(received, message + 1)
    dist.barrier()
    return arrived and (mesh.left is not None or len(overwriting) == 8)


def test_a_message_outlives_the_transfers_that_sent_it():
    assert all(ranks().run(message_of_dropped_transfers))


class Cuda:
    """Stands in for CUDA streams and for the two calls that NCCL answers; keeps what happened, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.current: Any = Stream("compute", self.events)
        self.names = iter(["right, leaving", "right, arriving", "left, leaving", "left, arriving"])

    def make(self, device: torch.device) -> Stream:
        return Stream(next(self.names), self.events)

    @contextlib.contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def post(self, name: str) -> Any:
        def call(buffer: torch.Tensor, **kwargs: Any) -> Any:
            self.events.append((name, self.current.name))
            return Work(self, name)

        return call

    def record_stream(self, buffer: torch.Tensor, stream: Stream) -> None:
        self.events.append(("record", stream.name))


class Stream:
    def __init__(self, name: str, events: list[tuple[str, str]]) -> None:
        self.name, self._events = name, events

    def wait_stream(self, other: Stream) -> None:
        self._events.append((f"{self.name} waits for", other.name))


class Work:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self._name = cuda, name

    def wait(self) -> None:
        self._cuda.events.append((f"wait for {self._name}", self._cuda.current.name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", cuda.make)
    monkeypatch.setattr(torch.cuda, "stream", cuda.using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: cuda.record_stream(x, stream))
    monkeypatch.setattr(dist, "isend", cuda.post("isend"))
    monkeypatch.setattr(dist, "irecv", cuda.post("irecv"))
    with FakeTensorMode():
        yield cuda


class Group:
    """A communicator that nobody else is in."""


def test_on_cuda_each_direction_has_its_streams(cuda: Cuda):
    mesh = Mesh(sp=3, sp_rank=1, rank=1, device=torch.device("cuda"), rightward=Group(), leftward=Group())
    transfers, x = Transfers(mesh), torch.ones(3, device="cuda")
    cuda.events.clear()

    transfers.send_right(x)
    leaving = "right, leaving"
    sent = [(f"{leaving} waits for", "compute"), ("record", leaving), ("isend", leaving)]
    assert cuda.events == sent, "a send follows what the compute stream made"
    cuda.events.clear()

    arrival = transfers.expect_left(x)
    assert cuda.events == [("irecv", "right, arriving")], "a receive waits for nothing of this rank"
    arrival.wait()
    arrival.wait()
    received = [("irecv", "right, arriving"), ("wait for irecv", "compute"), ("record", "compute")]
    assert cuda.events == received, "the compute stream waits, once, and keeps the buffer"
    cuda.events.clear()

    for _ in range(8):
        transfers.send_left(x)
    finished = [event for event in cuda.events if event[0] == "wait for isend"]
    assert finished == [("wait for isend", "left, leaving")], "the compute stream never waits for a send"
