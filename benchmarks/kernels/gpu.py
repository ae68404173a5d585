"""The cases on a GPU: ceilings, the operation at every size, decoding, the scan's latency, the rivals.

Every time is by the device's clock on several sets of operands in turn. The operation is checked against fp64
before it is timed: a wrong result is marked, and counts as a missed target. In order of importance, so that
what a time limit cuts off is what matters least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import compress, compress_call, decode_layers, rival_call
from benchmarks.kernels.device import Device, Job
from benchmarks.kernels.record import Case
from benchmarks.kernels.sizes import Shape, arithmetic, floor_bytes, make_operands
from benchmarks.kernels.timing import Call, in_turns, summaries, summary, timed_pass

__all__ = ["GpuPlan", "case_name", "gpu_cases", "rival_name", "warm_jobs"]

OUTPUT_ERROR, GRADIENT_ERROR = 5e-3, 1e-2  # RMS ratio to fp64 in bf16
SCANS = ("scan_forward", "scan_backward")  # parts of the kernels' names


@dataclass(frozen=True)
class GpuPlan:
    """Sizes of a run on a GPU.

    Attributes:
        shapes: (B, T, H, D) of every comparison, the most important first.
        chunks, slots: C and M.
        latency: (B, T, H) at which the scan's time per chunk is taken.
        decode_batches, decode_layers: of decoding; widths and heads are the first shape's.
        sets: sets of operands used in turn.
        repetitions: measured rounds, after two that are dropped.
    """

    shapes: tuple[tuple[int, int, int, int], ...] = (
        (8, 2048, 12, 64),
        (4, 4096, 16, 64),
        (2, 16384, 16, 64),
        (1, 32768, 16, 96),
    )
    chunks: tuple[int, ...] = (64, 16)
    slots: int = 64
    latency: tuple[int, int, int] = (1, 32768, 16)
    decode_batches: tuple[int, ...] = (1, 64)
    decode_layers: int = 24
    sets: int = 3
    repetitions: int = 30

    def shape(self, sizes: tuple[int, int, int, int], chunk: int, update: str = "stale") -> Shape:
        """One of the shapes at a chunk size."""
        return Shape(*sizes, slots=self.slots, chunk=chunk, update=update)

    @property
    def own(self) -> list[Shape]:
        """What the operation is timed at."""
        return [
            self.shape(sizes, chunk, update)
            for sizes in self.shapes
            for update in ("stale", "corrected")
            for chunk in self.chunks
        ]

    @property
    def rivals(self) -> list[tuple[str, Shape]]:
        """Rivals and shapes; only TTT-linear's chunk is part of its function."""
        return [
            (name, self.shape(sizes, chunk))
            for sizes in self.shapes
            for name in ("attention", "chunk_gsa", "ttt_linear", "chunk_gated_delta_rule")
            for chunk in (self.chunks if name == "ttt_linear" else self.chunks[:1])
        ]

    @property
    def latencies(self) -> list[Shape]:
        """One long sequence for each width, chunk and update."""
        widths = dict.fromkeys(sizes[3] for sizes in self.shapes)
        return [
            self.shape((*self.latency, width), chunk, update)
            for width in widths
            for update in ("stale", "corrected")
            for chunk in self.chunks
        ]

    @property
    def decodes(self) -> list[Shape]:
        """One token of a layer."""
        _, _, heads, width = self.shapes[0]
        chunk = self.chunks[0]
        return [self.shape((batch, 1, heads, width), chunk) for batch in self.decode_batches]

    def as_json(self) -> dict[str, Any]:
        """The settings for a record's identity; lists as they come back from a file."""
        found: dict[str, Any] = dataclasses.asdict(self)
        found["shapes"] = [list(sizes) for sizes in self.shapes]
        return {name: list(x) if isinstance(x, tuple) else x for name, x in found.items()}

    @staticmethod
    def of_json(settings: dict[str, Any]) -> GpuPlan:
        """Counterpart of ``as_json``."""
        found = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
        return GpuPlan(**(found | {"shapes": tuple(tuple(sizes) for sizes in settings["shapes"])}))


def case_name(kind: str, shape: Shape) -> str:
    """kind/BxTxHxD/C chunk/update."""
    return f"{kind}/{shape.name}/C {shape.chunk}/{shape.update}"


def rival_name(name: str, shape: Shape) -> str:
    """The case of a rival: with the chunk where that is part of its function."""
    return f"{name}/{shape.name}" + (f"/C {shape.chunk}" if name == "ttt_linear" else "")


def gpu_cases(plan: GpuPlan, device: Device) -> list[Case]:
    """Every case of a run, in order."""
    cases = [Case("ceilings", lambda: _ceilings(device))]
    cases += [Case(case_name("compress", s), _compress(plan, s, device)) for s in plan.own]
    cases += [Case(f"decode/B {s.batch}", _decode(plan, s, device)) for s in plan.decodes]
    cases += [Case(case_name("scan latency", s), _latency(s, device)) for s in plan.latencies]
    return cases + [
        Case(rival_name(name, s), _rival(plan, name, s, device), optional=True) for name, s in plan.rivals
    ]


def warm_jobs(plan: GpuPlan) -> list[Job]:
    """What to compile ahead: a job for each contender at each width, chunk and update."""
    jobs: dict[tuple[str, int, int, str], list[Shape]] = {}
    wanted = [("compress", s) for s in (*plan.own, *plan.latencies)] + plan.rivals
    for name, s in wanted:
        if name != "attention":  # compiled already
            jobs.setdefault((name, s.width, s.chunk, s.update), []).append(s)
    decode = Job("decode", tuple(plan.decodes))
    return [decode, *(Job(key[0], tuple(shapes)) for key, shapes in jobs.items())]


def _ceilings(device: Device) -> dict[str, Any]:
    """What the device reaches: bytes read and written by a large copy, bf16 arithmetic of a large product."""
    source = torch.randn(device.copy_bytes // 4, device=device.device)
    target, width = torch.empty_like(source), device.matmul_width
    a, b = (torch.randn(width, width, device=device.device).bfloat16() for _ in range(2))
    work: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    turns = {name: _timed(device, run) for name, run in work.items()}
    ms = {name: summary(found) for name, found in in_turns(turns, repetitions=10, warmup=3).items()}
    moved = 2 * source.numel() * source.element_size()
    return {
        "bytes_per_second": moved / ms["copy"]["median"] * 1e3,
        "flops_per_second": 2 * width**3 / ms["product"]["median"] * 1e3,
        "ms": ms,
    }


def _timed(device: Device, work: Callable[[], object], *, behind_fill: bool = True) -> Callable[[int], float]:
    """Milliseconds of the work; ``behind_fill``: of the device alone, not of the host that launches it."""

    def measure(_: int) -> float:
        if behind_fill:
            device.clock.prepare()
        begin = device.clock.stamp()
        work()
        return device.clock.milliseconds(begin, device.clock.stamp())

    return measure


def _compress(plan: GpuPlan, shape: Shape, device: Device) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        how = {"dtype": torch.bfloat16, "device": device.device}
        calls = [compress_call(shape, backend=device.backend, seed=i, **how) for i in range(plan.sets)]
        errors = _errors(shape, calls[0], device)
        found: dict[str, Any] = {
            "errors": errors,
            "exact": errors["y"] <= OUTPUT_ERROR
            and errors["y_prefix"] <= OUTPUT_ERROR
            and max(errors["gradients"].values()) <= GRADIENT_ERROR,
            "bitwise_repeatable": _repeats(calls[0]),
            "floor_bytes": floor_bytes(shape, torch.bfloat16.itemsize),
            "flops": arithmetic(shape),
            "ms": _times(plan, calls, device),
        }
        found["kernels_ms"] = device.kernel_times(lambda: _whole_pass(calls[0]))
        return found

    return measure


def _times(plan: GpuPlan, calls: Sequence[Call], device: Device) -> dict[str, Any]:
    dy = torch.randn_like(calls[0].forward(calls[0].operands))
    turns = {"": lambda i: timed_pass(device.clock, calls[i % len(calls)], dy)}
    return summaries(in_turns(turns, repetitions=plan.repetitions, warmup=2)[""])


def _whole_pass(call: Call) -> tuple[Tensor, ...]:
    y = call.forward(call.operands)
    g = torch.Generator(device=y.device).manual_seed(2)
    dy = torch.randn(y.shape, generator=g, device=y.device, dtype=torch.float32).to(y.dtype)
    return (y, *call.gradients(y, dy))


def _repeats(call: Call) -> bool:
    first, second = _whole_pass(call), _whole_pass(call)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _errors(shape: Shape, timed: Call, device: Device) -> dict[str, Any]:
    """RMS ratios to fp64: output and gradients of a small call, and the timed call's first tokens and heads.

    What comes later in a sequence, or in other heads, does not change those.
    """
    length = min(shape.length, 4 * shape.chunk + shape.chunk // 2 + 1)
    small = dataclasses.replace(shape, batch=min(2, shape.batch), length=length, heads=min(2, shape.heads))
    operands = make_operands(small, dtype=torch.bfloat16, device=device.device, seed=100)
    ours = _whole_pass(Call(operands, lambda x: compress(x, small, device.backend)))
    exact = _whole_pass(_in_fp64(operands, small))
    cut = {name: x[: small.batch, :length, : small.heads] for name, x in timed.operands.items()}
    exact_cut = _in_fp64(cut, small)
    y = timed.forward(timed.operands)[: small.batch, :length, : small.heads]
    names = list(operands)
    return {
        "y": _rms_ratio(ours[0], exact[0]),
        "y_prefix": _rms_ratio(y, exact_cut.forward(exact_cut.operands)),
        "gradients": {n: _rms_ratio(a, b) for n, a, b in zip(names, ours[1:], exact[1:], strict=True)},
    }


def _in_fp64(operands: dict[str, Any], shape: Shape) -> Call:
    doubled = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    return Call(doubled, lambda x: compress(x, shape, "chunkwise"))


def _rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """inf where a number is missing (NaN)."""
    difference = actual.detach().double() - expected.detach()
    ratio = float(difference.norm() / expected.detach().norm())
    return ratio if ratio == ratio else 1e300


def _decode(plan: GpuPlan, shape: Shape, device: Device) -> Callable[[], dict[str, Any]]:
    """Microseconds per layer, replayed as a graph and launched by the host."""

    def measure() -> dict[str, Any]:
        how = {"dtype": torch.bfloat16, "device": device.device}
        step = decode_layers(shape, layers=plan.decode_layers, backend=device.backend, **how)
        step()
        turns = {
            "graph": _timed(device, device.capture(step)),
            "eager": _timed(device, step, behind_fill=False),
        }
        times = in_turns(turns, repetitions=plan.repetitions, warmup=2)
        return {
            "microseconds": {
                name: summary([1e3 * ms / plan.decode_layers for ms in found])
                for name, found in times.items()
            }
        }

    return measure


def _latency(shape: Shape, device: Device) -> Callable[[], dict[str, Any]]:
    """Microseconds per chunk of the scans alone: in forward, again in backward, and the reverse one."""

    def measure() -> dict[str, Any]:
        how = {"dtype": torch.bfloat16, "device": device.device}
        call = compress_call(shape, backend=device.backend, **how)
        forward = device.kernel_times(lambda: call.forward(call.operands))
        both = device.kernel_times(lambda: _whole_pass(call))
        scan, again, reverse = (
            _of_kernel(times, name)
            for times, name in ((forward, SCANS[0]), (both, SCANS[0]), (both, SCANS[1]))
        )
        per_chunk = 1e3 / shape.chunks
        return {
            "microseconds_per_chunk": {
                "forward": scan * per_chunk,
                "again": max(0.0, again - scan) * per_chunk,
                "reverse": reverse * per_chunk,
            }
        }

    return measure


def _of_kernel(times: dict[str, float], name: str) -> float:
    found = [ms for kernel, ms in times.items() if name in kernel]
    if not found:
        raise ValueError(f"no kernel named like {name} ran, only {', '.join(sorted(times))[:200]}")
    return sum(found)


def _rival(plan: GpuPlan, name: str, shape: Shape, device: Device) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        how = {"dtype": torch.bfloat16, "device": device.device}
        calls = [rival_call(name, shape, seed=i, **how) for i in range(plan.sets)]
        finite = all(bool(torch.isfinite(x).all()) for x in _whole_pass(calls[0]))
        return {"finite": finite, "ms": _times(plan, calls, device)}

    return measure
