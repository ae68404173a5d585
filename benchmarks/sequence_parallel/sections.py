"""The cases of a run, in order: each measures one thing and is resumed by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.kernels.record import Case
from benchmarks.sequence_parallel.extrapolate import extrapolate, quarter_scan
from benchmarks.sequence_parallel.memory import measure_memory
from benchmarks.sequence_parallel.plan import Plan, WavePlan
from benchmarks.sequence_parallel.simulate import Link, StageTimes
from benchmarks.sequence_parallel.stages import measure_stages, stage_times
from benchmarks.sequence_parallel.subject import Subject
from benchmarks.sequence_parallel.throughput import Pair, measure_throughput
from benchmarks.sequence_parallel.traffic import measure_traffic
from benchmarks.sequence_parallel.wavefront import Wave, measure_wave

__all__ = ["all_cases"]


def all_cases(plan: Plan, results: dict[str, Any]) -> list[Case]:
    """Every case; ``results`` holds those that have been measured, which later ones read."""
    cases = [Case(f"bytes/{mode}", _traffic(plan, mode)) for mode in plan.modes]
    cases += [Case("stages", lambda: _stages(plan))]
    cases += [Case(wave.name, _wave(plan, wave, results)) for wave in plan.waves]
    cases += [Case("extrapolation", lambda: _extrapolation(plan, results))]
    cases += [Case(f"memory/sp {sp}", _memory(plan, sp)) for sp in plan.memory_sp]
    cases += [Case("throughput/dp 2", lambda: _replicas(plan))]
    return cases + [Case(f"throughput/sp 2, T {n}", _segments(plan, n)) for n in plan.sp_lengths]


def _traffic(plan: Plan, mode: str) -> Callable[[], dict[str, Any]]:
    return lambda: measure_traffic(
        plan.tiny,
        mode=mode,
        sp=plan.traffic_sp,
        rows=plan.traffic_rows,
        lengths=plan.traffic_lengths,
        micro_batches=plan.traffic_micro_batches,
    )


def _stages(plan: Plan) -> dict[str, Any]:
    found = measure_stages(plan.layer, rows=1, length=plan.layer_length, repetitions=plan.stage_repetitions)
    return {"ms": found, "length": plan.layer_length}


def _measured(results: dict[str, Any]) -> StageTimes:
    return stage_times(_needed(results, "stages")["ms"])


def _needed(results: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = results.get(name, {"error": "not measured"})
    if "error" in found:
        raise ValueError(f"{name} is missing ({found['error']}): start again to measure it first")
    return found


def _wave(plan: Plan, wave: WavePlan, results: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        times = _measured(results)
        if wave.shares == "quarter":
            times = quarter_scan(times)
        factor = plan.layer_seconds / (times.forward + times.backward)
        traced = Wave(
            times=times.scaled(factor),
            layers=plan.wave_layers,
            sp=wave.sp,
            micro_batches=wave.micro_batches,
            forwards_first=wave.forwards_first,
            slots=plan.slots,
            repetitions=plan.wave_repetitions,
        )
        settings = {"sp": wave.sp, "shares": wave.shares, "layers": plan.wave_layers}
        settings |= {"micro_batches": wave.micro_batches, "forwards_first": wave.forwards_first}
        return settings | measure_wave(traced)

    return measure


def _extrapolation(plan: Plan, results: dict[str, Any]) -> dict[str, Any]:
    link = Link(**_needed(results, plan.waves[0].name)["link"])
    return extrapolate(
        _measured(results),
        link,
        model=plan.layer,
        measured_length=plan.layer_length,
        layers=plan.wave_layers,
        meshes=plan.meshes,
        lengths=plan.lengths,
    )


def _memory(plan: Plan, sp: int) -> Callable[[], dict[str, Any]]:
    return lambda: measure_memory(
        Subject(plan.small, sp=sp),
        lengths=tuple(sp * length for length in plan.memory_lengths),
        budget=plan.memory_budget,
        tries=plan.memory_tries,
    )


def _replicas(plan: Plan) -> dict[str, Any]:
    size = (plan.dp_length, plan.dp_rows, plan.dp_micro_batches)
    pairs = [Pair(f"dp 2, {name}", subject, *size) for name, subject in _subjects(plan, dp=2)]
    return measure_throughput(pairs, repetitions=plan.repetitions)


def _segments(plan: Plan, length: int) -> Callable[[], dict[str, Any]]:
    pairs = [Pair(f"sp 2, {name}", subject, length) for name, subject in _subjects(plan, sp=2)]
    return lambda: measure_throughput(pairs, repetitions=plan.repetitions)


def _subjects(plan: Plan, *, dp: int = 1, sp: int = 1) -> Iterator[tuple[str, Subject]]:
    for engine, stage in plan.engines:
        name = engine if engine == "local" else f"{engine} ZeRO {stage}"
        yield name, Subject(plan.small, dp=dp, sp=sp, engine=engine, zero_stage=stage)
