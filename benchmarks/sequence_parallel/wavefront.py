"""The wavefront, traced: a whole training step on sp ranks with every stage padded to a given time.

Everything is real but the time a stage takes: model, autograd, state passing, halo, engine, gradient sum,
optimizer. The model has few tokens and little width, so that its own work is a few percent of the padded
times, and as many slots as give the state the size it has in a large model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.kernels.timing import summary
from benchmarks.sequence_parallel.pacing import Pacer, watch
from benchmarks.sequence_parallel.ranks import Ranks
from benchmarks.sequence_parallel.simulate import Link, Outcome, Span, StageTimes, Step, ideal, simulate
from benchmarks.sequence_parallel.subject import Subject, make_batches
from benchmarks.sequence_parallel.traffic import halo_bytes, state_bytes
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.parallel.mesh import Mesh

__all__ = ["Wave", "measure_wave", "padded_model", "span_rows", "spans_of"]

SMALL, PINGS, SUMS = 1024, 20, 5  # bytes of a small message; exchanges and sums that are timed


@dataclass(frozen=True)
class Wave:
    """One traced step; times are of one layer on one segment."""

    times: StageTimes
    layers: int
    sp: int
    micro_batches: int
    forwards_first: int = 1
    slots: int = 768
    repetitions: int = 3


def padded_model(layers: int, slots: int) -> ModelConfig:
    """One head of 64: a state of 2 x slots x 64 numbers, with 768 slots that of 12 heads of 64 slots."""
    options = TrellisConfig(slots=slots, chunk_size=16)
    return ModelConfig(vocab_size=64, num_layers=layers, dim=64, num_heads=1, mlp_hidden=64, trellis=options)


def measure_wave(wave: Wave) -> dict[str, Any]:
    """Seconds of the step beside what the simulation says and beside the ideal; the median step's spans."""
    with Ranks(wave.sp) as ranks:
        found = ranks.run(_trace, wave)
    seconds = [
        max(end for _, end in times) - min(begin for begin, _ in times)
        for times in zip(*(one["clock"] for one in found), strict=True)
    ]
    step = _simulated(wave, found[0]["link"], found[0]["sums"])
    predicted, best = simulate(step), ideal(step)
    median = min(range(len(seconds)), key=lambda i: abs(seconds[i] - statistics.median(seconds)))
    start = min(one["clock"][median][0] for one in found)
    spans = [span for one in found for span in one["spans"][median]]
    return {
        "step_s": summary(seconds),
        "predicted": predicted.makespan,
        "off": predicted.makespan / statistics.median(seconds) - 1,
        "ideal": best,
        "efficiency": best / statistics.median(seconds),
        "waited": _waits(spans, predicted),
        "overrun": max(one["overrun"] for one in found),
        "link": asdict(step.link),
        "gradients_s": step.gradients,
        "stages_s": asdict(wave.times),
        "spans": span_rows(spans, start),
    }


def _simulated(wave: Wave, link: Link, sums: float) -> Step:
    model = padded_model(wave.layers, wave.slots)
    return Step(
        times=wave.times,
        layers=wave.layers,
        sp=wave.sp,
        micro_batches=wave.micro_batches,
        forwards_first=wave.forwards_first,
        state=state_bytes(model),
        halo=halo_bytes(model),
        link=link,
        gradients=sums,
    )


def _waits(spans: Sequence[Span], predicted: Outcome) -> dict[str, list[float]]:
    """Seconds that each rank waited for a neighbour, as traced and as simulated."""
    found = {}
    for name, some in (("traced", spans), ("simulated", predicted.spans)):
        ranks = sorted({span.rank for span in some})
        found[name] = [round(sum(s.waited for s in some if s.rank == rank), 4) for rank in ranks]
    return found


def _trace(wave: Wave) -> dict[str, Any]:
    """On one rank: the link, then the steps."""
    subject = Subject(padded_model(wave.layers, wave.slots), sp=wave.sp, forwards_first=wave.forwards_first)
    mesh = subject.mesh()
    engine = subject.build(mesh)
    weights = sum(parameter.numel() for parameter in engine.model.parameters())
    found: dict[str, Any] = {"link": _ping(mesh, subject.model), "sums": _time_sums(weights, mesh)}
    pacer = Pacer(mesh.sp_rank)
    length = 2 * subject.model.trellis.chunk_size * wave.sp
    batches = make_batches(64, rows=1, length=length, micro_batches=wave.micro_batches)
    valid = sum(batch.valid_tokens for batch in batches)
    with watch(engine.model.blocks, pacer):  # type: ignore[arg-type]
        engine.train_step(batches, lr=1e-3, valid_tokens=valid)
        found["clock"], found["spans"] = [], []
        pacer.pad(wave.times)
        for _ in range(wave.repetitions):
            pacer.restart()
            dist.barrier()
            begin = time.monotonic()
            engine.train_step(batches, lr=1e-3, valid_tokens=valid)
            found["clock"].append((begin, time.monotonic()))
            found["spans"].append(list(pacer.spans))
    return found | {"overrun": pacer.overrun}


def _ping(mesh: Mesh, model: ModelConfig) -> Link:
    """The link between the first two ranks: half the time of a message there and one back."""
    small, large = (_exchange(mesh, size) for size in (SMALL, int(state_bytes(model))))
    dist.barrier()
    size = state_bytes(model) - SMALL
    link = [Link(small, size / max(large - small, 1e-9))]
    dist.broadcast_object_list(link, src=0)
    return link[0]


def _exchange(mesh: Mesh, size: int) -> float:
    buffer, seconds = torch.zeros(size // 4), []
    for _ in range(PINGS):
        begin = time.monotonic()
        if mesh.sp_rank == 0:
            dist.send(buffer, dst=1, group=mesh.rightward)
            dist.recv(buffer, src=1, group=mesh.leftward)
        elif mesh.sp_rank == 1:
            dist.recv(buffer, src=0, group=mesh.rightward)
            dist.send(buffer, dst=0, group=mesh.leftward)
        seconds.append((time.monotonic() - begin) / 2)
    return statistics.median(seconds)


def _time_sums(elements: int, mesh: Mesh) -> float:
    """Median seconds of one all-reduce of all gradients."""
    flat, seconds = torch.zeros(elements), []
    for _ in range(SUMS):
        dist.barrier(group=mesh.sp_group)
        begin = time.monotonic()
        dist.all_reduce(flat, group=mesh.sp_group)
        seconds.append(time.monotonic() - begin)
    return statistics.median(seconds)


def span_rows(spans: Sequence[Span], start: float) -> list[str]:
    """Lines of rank, micro-batch, layer, phase; then, in ms, begin, waited, scan begin, scan end, end."""
    rows = []
    for span in sorted(spans, key=lambda s: (s.rank, s.begin)):
        times = (span.begin - start, span.waited, span.scan_begin - start, span.scan_end - start)
        text = " ".join(f"{1e3 * x:.1f}" for x in (*times, span.end - start))
        rows.append(f"{span.rank} {span.micro_batch} {span.layer} {span.phase} {text}")
    return rows


def spans_of(rows: Sequence[str]) -> list[Span]:
    """What ``span_rows`` wrote, from a start at 0, in seconds."""
    found = []
    for row in rows:
        rank, micro_batch, layer, phase, *times = row.split()
        begin, waited, scan_begin, scan_end, end = (1e-3 * float(x) for x in times)
        found.append(
            Span(
                rank=int(rank),
                micro_batch=int(micro_batch),
                layer=int(layer),
                phase=phase,
                begin=begin,
                waited=waited,
                scan_begin=scan_begin,
                scan_end=scan_end,
                end=end,
            )
        )
    return found
