"""Comparing what an engine shows with the reference, slice by slice; what differs says where."""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoints.logical import Box, LogicalTensor
from trellis_dist.parallel import env
from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.parity.cases import Tolerance
from trellis_dist.training.parity.reference import Reference

__all__ = ["CaseResult", "Comparison", "Failure", "Findings", "Trace", "merge"]

# (step, what) -> its bits: what a case of the same bits must show too.
Trace = dict[tuple[int, str], str]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What was not as it must be, and where: ``step`` counts from 0 and is -1 outside of steps."""

    case: str
    quantity: str
    expected: str
    found: str
    step: int = -1
    rank: int = field(default_factory=env.rank)
    host: str = field(default_factory=socket.gethostname)

    def line(self) -> str:
        """One sentence for people."""
        when = f"step {self.step}, " if self.step >= 0 else ""
        where = f"{when}rank {self.rank} on {self.host}"
        if self.quantity == "error":
            return f"{where}: {self.found}"
        return f"{where}: {self.quantity}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row as all ranks saw it; ``worst`` has the largest relative error of each kind."""

    name: str
    seconds: float
    worst: Mapping[str, float]
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed on any rank."""
        return not self.failures


@dataclass
class Findings:
    """What one rank has seen of a case.

    Attributes:
        worst: largest relative error of each kind.
        failures: what was beyond its tolerance.
        numbers: (loss, gradient norm) of each step.
        shown: shape and boxes of the tensors that its engine showed.
        complete: names of tensors of which every element must be shown by some rank.
        seconds, host: how long it took here, and where that is.
    """

    worst: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    numbers: list[tuple[float, float]] = field(default_factory=list)
    shown: dict[str, tuple[tuple[int, ...], set[Box]]] = field(default_factory=dict)
    complete: tuple[str, ...] = ()
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)


class Comparison:
    """Compares one rank's steps; a difference is noted and the case goes on, so that ranks stay together."""

    def __init__(self, case: str, reference: Reference, tolerance: Tolerance) -> None:
        self.findings = Findings()
        self.trace: Trace = {}
        self.step = 0
        self._case, self._reference, self._tolerance = case, reference, tolerance

    def gradients(self, parts: list[LogicalTensor]) -> None:
        """The engine's inspector."""
        for part in parts:
            self._slice(part, self._reference[self.step].gradients, "gradient")

    def result(self, result: StepResult) -> None:
        """Compare what the engine says of the step, and go on to the next."""
        expected = self._reference[self.step]
        self._number("loss", expected.loss, result.loss, self._tolerance.loss)
        self._number("gradient norm", expected.norm, result.grad_norm, self._tolerance.norm)
        if not result.applied:
            self._fail("update", "applied", "skipped")
        self.findings.numbers.append((result.loss, result.grad_norm))
        self.trace[self.step, "loss"] = result.loss.hex()
        self.trace[self.step, "gradient norm"] = result.grad_norm.hex()
        self.step += 1

    def weights(self, parts: Iterable[LogicalTensor]) -> None:
        """Compare the weights after the steps that were compared; every element must have been shown."""
        for part in parts:
            if part.name.startswith("model/"):
                self._slice(part, self._reference[self.step - 1].weights, "weight")
        names = self._reference[0].weights
        self.findings.complete = tuple(f"{kind}/{n}" for n in names for kind in ("gradient", "model"))

    def same_bits(self, other: Trace) -> None:
        """Note the first thing whose bits are not those of ``other``, which may have gone on for longer."""
        for (step, what), bits in other.items():
            found = self.trace.get((step, what))
            if step < self.step and found != bits:
                self._fail(f"bits of {what}", bits, str(found), step=step)
                return

    def _slice(self, part: LogicalTensor, whole: Mapping[str, Tensor], kind: str) -> None:
        name = part.name.partition("/")[2]
        if name not in whole or tuple(whole[name].shape) != tuple(part.global_shape):
            shape = tuple(whole[name].shape) if name in whole else "no such parameter"
            self._fail(part.name, str(shape), str(tuple(part.global_shape)))
            return
        box = part.box
        self.findings.shown.setdefault(part.name, (tuple(part.global_shape), set()))[1].add(box)
        local, expected = part.local.detach().cpu(), whole[name][box.slices_from((0,) * len(box.offset))]
        # A slice is measured by the whole parameter: its own few elements may be rounding alone.
        scale = float(whole[name].double().norm()) or 1.0
        error = float((local.double() - expected.double()).norm()) / scale
        if self._beyond(kind, error, getattr(self._tolerance, kind)):
            found = f"norm {float(local.double().norm()):.9g} in {_place(box)} (off by {error:.2g})"
            self._fail(part.name, f"norm {float(expected.double().norm()):.9g}", found)
        self.trace[self.step, f"{part.name} {box.offset}"] = _bits(local)

    def _number(self, kind: str, expected: float, found: float, tolerance: float) -> None:
        error = abs(found - expected) / abs(expected)
        if self._beyond(kind, error, tolerance):
            self._fail(kind, f"{expected:.9g}", f"{found:.9g} (off by {error:.2g})")

    def _beyond(self, kind: str, error: float, tolerance: float) -> bool:
        error = error if math.isfinite(error) else math.inf
        self.findings.worst[kind] = max(error, self.findings.worst.get(kind, 0.0))
        return error > tolerance

    def _fail(self, quantity: str, expected: str, found: str, *, step: int | None = None) -> None:
        self.findings.failures.append(
            Failure(
                case=self._case,
                quantity=quantity,
                expected=expected,
                found=found,
                step=self.step if step is None else step,
            )
        )


def merge(case: str, found: list[Findings]) -> CaseResult:
    """One result of all ranks' findings, by rank."""
    kinds = {kind for rank in found for kind in rank.worst}
    failures = [failure for rank in found for failure in rank.failures]
    if not any(failure.quantity == "error" for failure in failures):
        failures += [*_disagreements(case, found), *_gaps(case, found)]
    return CaseResult(
        name=case,
        seconds=max(rank.seconds for rank in found),
        worst={kind: max(rank.worst.get(kind, 0.0) for rank in found) for kind in sorted(kinds)},
        failures=tuple(sorted(failures, key=lambda failure: (failure.step, failure.rank))),
    )


def _disagreements(case: str, found: list[Findings]) -> Iterator[Failure]:
    """Loss and norm are the same bits on every rank, or ranks would decide differently."""
    for rank, findings in enumerate(found):
        for step, (ours, theirs) in enumerate(zip(found[0].numbers, findings.numbers, strict=True)):
            if ours != theirs:
                yield Failure(
                    case=case,
                    quantity="(loss, gradient norm) of rank 0",
                    expected=str(ours),
                    found=str(theirs),
                    step=step,
                    rank=rank,
                    host=findings.host,
                )
                break


def _gaps(case: str, found: list[Findings]) -> Iterator[Failure]:
    for name in found[0].complete:
        parts = [rank.shown[name] for rank in found if name in rank.shown]
        shown = torch.zeros(parts[0][0] if parts else (1,), dtype=torch.bool)
        for box in set().union(*(boxes for _, boxes in parts)):
            shown[box.slices_from((0,) * len(box.offset))] = True
        if not bool(shown.all()):
            held = f"{int(shown.sum())} of {shown.numel()} elements" if parts else "nothing"
            yield Failure(case=case, quantity=name, expected="shown by some rank", found=held)


def _place(box: Box) -> str:
    return "x".join(str(size) for size in box.shape) + f" from {list(box.offset)}"


def _bits(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
