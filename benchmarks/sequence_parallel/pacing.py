"""The stages of a layer on the clock: measured as they run, or each padded with sleep to a given time.

``watch`` puts marks between the stages of a real model, forward and backward, without changing what it
computes. Where one stage ends the next begins; a wait for a neighbour belongs to none. With given
times a stage that took less sleeps for the rest, so a rank needs a core only for the little real work, and
ranks that share two cores run as if each had its own.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sequence_parallel.simulate import Span, StageTimes
from trellis_dist.models.mixers.trellis import TrellisMixer
from trellis_dist.parallel import sequence
from trellis_dist.parallel.transfers import Arrival

__all__ = ["Pacer", "watch"]


class Pacer:
    """Cuts a rank's time into stages and spans.

    Args:
        rank: for the spans.

    Attributes:
        spans: every pass over a layer that has ended.
        seconds: of each stage, in the order in which they ended.
        overrun: seconds that stages took beyond what they are padded to, in all.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._times: StageTimes | None = None
        self.phase, self.overrun = "forward", 0.0
        self.spans: list[Span] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._last = 0.0
        self._micro_batches: Counter[int] = Counter()
        self._span: dict[str, Any] = {}

    def pad(self, times: StageTimes) -> None:
        """From here on every stage sleeps until it has taken its time."""
        self._times = times

    def restart(self) -> None:
        """A step begins: forget the spans before it, count micro-batches from 0."""
        self.spans.clear()
        self._micro_batches.clear()

    def micro_batch(self, layer: int) -> int:
        """The number of the micro-batch whose forward pass comes to ``layer`` now."""
        self._micro_batches[layer] += 1
        return self._micro_batches[layer] - 1

    def begin(self, micro_batch: int, layer: int, phase: str) -> None:
        """A pass over a layer begins."""
        self.phase, self._last = phase, time.monotonic()
        self._span = {"micro_batch": micro_batch, "layer": layer, "phase": phase, "begin": self._last}
        self._span["waited"] = 0.0

    def stage(self, name: str) -> None:
        """Stage ``name`` ends here."""
        begin, now = self._last, time.monotonic()
        if self._times is not None:
            due = begin + getattr(self._times, name)
            # From the time it was due, not from the time the system woke it: lateness does not add up.
            self.overrun += max(0.0, now - due)
            now = now if now > due else _sleep_until(due)
        self.seconds[name].append(now - begin)
        if name.startswith("scan"):
            self._span |= {"scan_begin": begin, "scan_end": now}
        self._last = now

    def waited(self, since: float) -> None:
        """A wait that began at ``since`` ends here; what was done before it is the next stage's."""
        now = time.monotonic()
        if self._span:
            self._span["waited"] += now - since
        self._last += now - since

    def end(self) -> None:
        """The pass over the layer ends."""
        self.spans.append(Span(rank=self._rank, end=self._last, **self._span))
        self._span = {}


def _sleep_until(due: float) -> float:
    time.sleep(max(0.0, due - time.monotonic()))
    return due


class _Mark(torch.autograd.Function):
    """x, and an action when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return dx, None


def _mark(x: Tensor, action: Callable[[], None]) -> Tensor:
    return _Mark.apply(x, action)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def watch(blocks: nn.ModuleList, pacer: Pacer) -> Iterator[None]:
    """Within it ``pacer`` sees every stage of ``blocks``, which are split over the sequence already."""
    for layer, block in enumerate(blocks):
        _watch_block(block, layer, pacer)
        assert isinstance(block.mixer, TrellisMixer), "only Trellis layers have the stages"
        _watch_mixer(block.mixer, pacer)
    patched: Any = sequence
    real_stages, real_wait = patched.stages_for, Arrival.wait
    patched.stages_for = lambda *a: _watched_stages(real_stages(*a), pacer)
    Arrival.wait = _watched_wait(real_wait, pacer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        patched.stages_for = real_stages
        Arrival.wait = real_wait  # type: ignore[method-assign]


def _watch_block(block: nn.Module, layer: int, pacer: Pacer) -> None:
    """Marks where a pass over the block begins and ends, forward and backward."""
    current = 0

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal current
        current = pacer.micro_batch(layer)
        pacer.begin(current, layer, "forward")
        return (_mark(arguments[0], leave_backward), *arguments[1:])

    def leave(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        pacer.stage("finish")
        pacer.end()
        number = current
        return _mark(y, lambda: pacer.begin(number, layer, "backward"))

    def leave_backward() -> None:
        pacer.stage("project_back")
        pacer.end()

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)


def _watch_mixer(mixer: TrellisMixer, pacer: Pacer) -> None:
    """Marks around the convolution and the operation."""
    convolution, operation = mixer.convolution, mixer.operation
    dense = convolution._dense  # type: ignore[attr-defined]

    def marked_dense(x: Tensor, *arguments: Any, **named: Any) -> Any:
        return dense(_mark(x, lambda: pacer.stage("convolve_back")), *arguments, **named)

    def marked_convolution(*arguments: Any, **named: Any) -> Tensor:
        pacer.stage("project")
        return _mark(convolution(*arguments, **named), lambda: pacer.stage("inputs_back"))

    def marked_operation(*arguments: Any, **named: Any) -> tuple[Tensor, Any]:
        pacer.stage("convolve")
        y, state = operation(*arguments, **named)
        return _mark(y, lambda: pacer.stage("finish_back")), state

    convolution._dense = marked_dense  # type: ignore[attr-defined]
    mixer.convolution, mixer.operation = marked_convolution, marked_operation


def _watched_stages(real: Any, pacer: Pacer) -> SimpleNamespace:
    """The stages' module with a mark after those that end a stage of ``StageTimes``."""
    ends = {
        "scan_forward": "scan",
        "rescan": "rescan",
        "readout_backward": "readout_back",
        "scan_backward": "scan_back",
    }
    if pacer.phase == "forward":
        ends |= {"arrange": "arrange", "to_tokens": "readout"}
    functions = {name: getattr(real, name) for name in real.__all__}
    return SimpleNamespace(
        **functions | {name: _then(functions[name], pacer, end) for name, end in ends.items()}
    )


def _then(function: Callable[..., Any], pacer: Pacer, end: str) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        pacer.stage(end)
        return result

    return marked


def _watched_wait(real: Callable[..., Any], pacer: Pacer) -> Callable[..., Any]:
    def wait(arrival: Arrival) -> Any:
        since = time.monotonic()
        result = real(arrival)
        pacer.waited(since)
        return result

    return wait
