"""The cases on a CPU: chunkwise against plain loops, time against length, decoding, memory for backward."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import CPU_CONTENDERS, compress_call, cpu_call, rival_call
from benchmarks.kernels.memory import measured_in_own_process, saved_bytes
from benchmarks.kernels.record import Case
from benchmarks.kernels.sizes import Shape, make_operands
from benchmarks.kernels.timing import Call, Clock, HostClock, in_turns, summaries, summary, timed_pass
from kernels import CompressState, chunkwise, compress_kv, decode_step
from kernels.triton import compress

__all__ = ["CpuPlan", "cpu_cases"]

EXACT = 1e-10  # relative, fp64: contenders that compute something else are not compared
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CpuPlan:
    """Sizes of a run on a CPU.

    Attributes:
        shape: of the side by side comparison and, but for T, of time against length.
        lengths: T of time against length.
        layer: of decoding and of the memory for backward: one layer of a model.
        chunks: C of the memory for backward.
        positions: where decoding is timed, multiples of the chunk.
        threads: numbers of threads of the side by side comparison.
        repetitions: measured rounds, after one that is dropped.
        processes: processes that measure the peak memory of each contender.
    """

    shape: Shape = field(default_factory=lambda: Shape(2, 4096, 4, 64))
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    layer: Shape = field(default_factory=lambda: Shape(1, 1024, 12, 64))
    chunks: tuple[int, ...] = (16, 32, 64, 128, 256)
    positions: tuple[int, ...] = (0, 1024, 32768)
    threads: tuple[int, ...] = tuple(sorted({1, len(os.sched_getaffinity(0))}))
    repetitions: int = 9
    processes: int = 3

    def as_json(self) -> dict[str, Any]:
        """The settings for a record's identity; lists as they come back from a file."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def cpu_cases(plan: CpuPlan, *, clock: Clock | None = None) -> list[Case]:
    """Every case of a run, in order."""
    clock = HostClock() if clock is None else clock
    cases = [Case("contenders agree", lambda: _agreement(plan.shape))]
    cases += [Case(f"side by side/threads {n}", _side_by_side(plan, n, clock)) for n in plan.threads]
    cases += [Case(f"peak memory/{name}", _peak(plan, name)) for name in CPU_CONTENDERS]
    cases += [Case("saved for backward/chunkwise, plain loops", lambda: _held(plan))]
    cases += [Case("time against length", lambda: _lengths(plan, clock))]
    cases += [Case("decode", lambda: _decode(plan, clock))]
    return cases + [
        Case(f"saved for backward/layer in {name}", _saved(plan, dtype)) for name, dtype in TYPES.items()
    ]


def _agreement(shape: Shape) -> dict[str, Any]:
    """Largest relative difference to chunkwise in fp64: a rival must compute the same."""
    small = dataclasses.replace(shape, batch=1, length=4 * shape.chunk, heads=2)
    ours = _all_tensors(cpu_call("chunkwise", small, dtype=torch.float64))
    found = {}
    for name in ("plain_loop", "plain_loop_indexed"):
        theirs = _all_tensors(cpu_call(name, small, dtype=torch.float64))
        found[name] = max(_difference(a, b) for a, b in zip(theirs, ours, strict=True))
        if not found[name] <= EXACT:
            raise ValueError(f"{name} differs from chunkwise by {found[name]:.1e} in fp64, over {EXACT:.0e}")
    return {"relative_difference": found}


def _all_tensors(call: Call) -> list[Tensor]:
    y = call.forward(call.operands)
    g = torch.Generator().manual_seed(1)
    return [y, *call.gradients(y, torch.randn(y.shape, generator=g, dtype=y.dtype))]


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def _side_by_side(plan: CpuPlan, threads: int, clock: Clock) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        calls = {name: cpu_call(name, plan.shape, dtype=torch.float32) for name in CPU_CONTENDERS}
        dy = torch.randn(*calls["chunkwise"].operands["v"].shape)
        turns = {name: lambda _, call=call: timed_pass(clock, call, dy) for name, call in calls.items()}
        with _Threads(threads):
            passes = in_turns(turns, repetitions=plan.repetitions)
        ours = [one.both for one in passes["chunkwise"]]
        return {
            "threads": threads,
            "ms": {name: summaries(found) for name, found in passes.items()},
            "times_chunkwise": {
                name: summary([one.both / own for one, own in zip(found, ours, strict=True)])
                for name, found in passes.items()
            },
        }

    return measure


class _Threads:
    """Runs its block with this many threads."""

    def __init__(self, number: int) -> None:
        self.number, self.before = number, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _peak(plan: CpuPlan, name: str) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "bytes": {
            part: summary(values)
            for part, values in measured_in_own_process(name, plan.shape, times=plan.processes).items()
        }
    }


def _held(plan: CpuPlan) -> dict[str, Any]:
    return {
        "bytes": {
            name: saved_bytes(cpu_call(name, plan.shape, dtype=torch.float32)) for name in CPU_CONTENDERS
        }
    }


def _lengths(plan: CpuPlan, clock: Clock) -> dict[str, Any]:
    """Microseconds per token of forward + backward; short sequences take several calls a sample."""
    found = {}
    for update in ("stale", "corrected"):
        turns = {str(length): _per_token(plan, length, update, clock) for length in plan.lengths}
        with _Threads(1):
            times = in_turns(turns, repetitions=plan.repetitions)
        found[update] = {length: summary(values) for length, values in times.items()}
    return {"microseconds_per_token": found}


def _per_token(plan: CpuPlan, length: int, update: str, clock: Clock) -> Callable[[int], float]:
    shape = dataclasses.replace(plan.shape, length=length, update=update)
    calls = min(8, max(plan.lengths) // length)
    call = compress_call(shape, backend="chunkwise", dtype=torch.float32)
    dy = torch.ones_like(call.operands["v"])

    def measure(_: int) -> float:
        total = sum(timed_pass(clock, call, dy).both for _ in range(calls))
        return total * 1e3 / (calls * shape.tokens)

    return measure


@torch.no_grad()
def _decode(plan: CpuPlan, clock: Clock) -> dict[str, Any]:
    """Microseconds per token and layer over one chunk of steps from each position; one thread."""
    shape = dataclasses.replace(plan.layer, length=plan.shape.chunk)
    tokens = make_operands(shape, dtype=torch.float32, seed=1)
    turns = {}
    for position in plan.positions:
        turns[str(position)] = _steps(shape, tokens, _state_at(plan, position), clock)
    with _Threads(1):
        times = in_turns(turns, repetitions=plan.repetitions)
    return {"microseconds_per_token": {at: summary(values) for at, values in times.items()}}


def _steps(
    shape: Shape, tokens: dict[str, Any], state: CompressState, clock: Clock
) -> Callable[[int], float]:
    def measure(_round: int) -> float:
        now = state
        begin = clock.stamp()
        for t in range(shape.length):
            token = {name: x[:, t] for name, x in tokens.items()}
            _, now = decode_step(**token, state=now, chunk_size=shape.chunk)
        return clock.milliseconds(begin, clock.stamp()) * 1e3 / shape.length

    return measure


def _state_at(plan: CpuPlan, position: int) -> CompressState:
    """The state after ``position`` tokens."""
    shape = dataclasses.replace(plan.layer, length=max(position, 1))
    operands = make_operands(shape, dtype=torch.float32)
    _, state = compress_kv(**operands, chunk_size=shape.chunk, output_final_state=True)
    assert state is not None, "output_final_state was asked for"
    if position:
        return state
    zeros = (torch.zeros_like(state.key_memory), torch.zeros_like(state.value_memory))
    return CompressState(*zeros, *zeros)


def _saved(plan: CpuPlan, dtype: torch.dtype) -> Callable[[], dict[str, Any]]:
    """Bytes saved per token of a layer: measured at every C beside the formula, and softmax attention."""

    def measure() -> dict[str, Any]:
        chunks = {}
        for chunk in plan.chunks:
            shape = dataclasses.replace(plan.layer, chunk=chunk)
            found = saved_bytes(compress_call(shape, backend="chunkwise", dtype=dtype))
            chunks[str(chunk)] = {
                "measured": {part: size / shape.tokens for part, size in found.items()},
                "formula": _formula(shape, dtype.itemsize),
            }
        attention = saved_bytes(rival_call("attention", plan.layer, dtype=dtype))
        return {
            "bytes_per_token": chunks,
            "attention": {
                "measured": sum(attention.values()) / plan.layer.tokens,
                "formula": plan.layer.heads * (4 * plan.layer.width * dtype.itemsize + 4),
            },
            "decoding": {
                "attention_per_token": plan.layer.heads * 2 * plan.layer.width * dtype.itemsize,
                "state": 2 * plan.layer.heads * plan.layer.slots * 2 * plan.layer.width * 4,
            },
        }

    return measure


def _formula(shape: Shape, itemsize: int) -> dict[str, float]:
    """Operands H ((2 D + V + M) b + 8); memories 4 H M (D + V) G / (B T), G kept or all chunks."""
    memory = 4 * shape.heads * shape.slots * 2 * shape.width
    rows = (shape.batch, shape.length, shape.heads)
    starts, triton = (
        backend.saved_count(rows, shape.chunk, offset=0, device=torch.device("cpu"))
        for backend in (chunkwise, compress)
    )
    return {
        "operands": shape.heads * ((3 * shape.width + shape.slots) * itemsize + 8),
        "own": memory * starts / shape.tokens,
        "own_triton": memory * triton / shape.tokens,
        "every_chunk_start": memory * shape.batch * shape.chunks / shape.tokens,
    }
