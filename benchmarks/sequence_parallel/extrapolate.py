"""What the simulation says of meshes and lengths that this machine does not have.

Stage times are proportional to the tokens of a segment. Two devices:

    core    one core of this machine and the link that was measured between its processes
    device  the same layer at ``RATE`` operations a second with the scan a quarter of it in each direction,
            and the network ``NETWORK``: an assumption, not a measurement

Three schedules of four micro-batches: forward and backward of each in turn, all forwards first, and, for
contrast, in turn with one collective over all ranks after each layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.sequence_parallel.simulate import Link, StageTimes, Step, ideal, simulate
from benchmarks.sequence_parallel.traffic import FP32, halo_bytes, state_bytes
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import flops_per_token, parameter_counts

__all__ = ["SCHEDULES", "extrapolate", "quarter_scan"]

RATE = 400e12  # dense bf16, about 40% of an H100 or H200
NETWORK = Link(latency=10e-6, bandwidth=50e9)  # 400 Gb/s
MICRO_BATCHES = 4
SCHEDULES: dict[str, dict[str, Any]] = {
    "in turn": {},
    "4 forwards first": {"forwards_first": 4},
    "lock-step": {"lock_step": True},
}


def quarter_scan(times: StageTimes) -> StageTimes:
    """The same forward and backward times with scan and reverse scan a quarter of them."""
    forward, backward = times.forward, times.backward
    grow = 0.75 / (1 - times.scan / forward), 0.75 / (1 - times.scan_back / backward)
    names = list(times.__dataclass_fields__)
    changed = {name: getattr(times, name) * grow[names.index(name) > names.index("finish")] for name in names}
    return StageTimes(**changed | {"scan": forward / 4, "scan_back": backward / 4})


def extrapolate(
    times: StageTimes,
    link: Link,
    *,
    model: ModelConfig,
    measured_length: int,
    layers: int,
    meshes: tuple[int, ...],
    lengths: tuple[int, ...],
) -> dict[str, Any]:
    """Efficiency by device, length, schedule and sp; "sum" is without, "whole" with the gradient sum.

    Args:
        times: of one layer of ``model`` on ``measured_length`` tokens.
        link: between two processes of this machine.
    """
    body = replace(model, vocab_size=1)
    work = flops_per_token(body, sequence_length=1) / model.num_layers
    fast = quarter_scan(times).scaled(work * measured_length / RATE / (times.forward + times.backward))
    gradients = FP32 * parameter_counts(body).non_embedding // model.num_layers * layers
    devices = {"core": (times, link), "device": (fast, NETWORK)}
    found: dict[str, Any] = {}
    for device, (own, wire) in devices.items():
        base = Step(
            times=own,
            layers=layers,
            sp=1,
            micro_batches=MICRO_BATCHES,
            state=state_bytes(model),
            halo=halo_bytes(model),
            link=wire,
        )
        found[device] = {
            str(length): _by_schedule(base, length / measured_length, meshes, gradients) for length in lengths
        }
    return {
        "efficiency": found,
        "layers": layers,
        "micro_batches": MICRO_BATCHES,
        "gradient_bytes": gradients,
        "layer_seconds_per_token": {
            device: (own.forward + own.backward) / measured_length for device, (own, _) in devices.items()
        },
    }


def _by_schedule(
    base: Step, factor: float, meshes: tuple[int, ...], gradients: int
) -> dict[str, dict[str, list[float]]]:
    """Per schedule and sp: efficiency without and with the gradient sum."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, changes in SCHEDULES.items():
        found[name] = {}
        for sp in meshes:
            step = replace(base, times=base.times.scaled(factor / sp), sp=sp, **changes)
            passes, best = simulate(step).makespan, ideal(step)
            whole = passes + step.link.all_reduce_seconds(gradients, sp)
            found[name][str(sp)] = [round(best / passes, 4), round(best / whole, 4)]
    return found
