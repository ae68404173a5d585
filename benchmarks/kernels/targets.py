"""The project's targets against a record: met or missed, by how much, or why there is no verdict.

Pure functions of a record's cases; nothing is measured here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.gpu import GpuPlan, case_name, rival_name
from benchmarks.kernels.sizes import Shape

__all__ = ["Target", "cpu_targets", "floors", "gpu_targets"]

FASTER, MEMORY, CONSTANT = 3.0, 1 / 3, 1.15
FORWARD_MS, BACKWARD_MS, CORRECTED, DECODE_US = 0.2, 0.6, 1.5, 20.0


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: what is measured, with its unit.
        measured: None where a case is missing.
        bound: None where there is a number to report and none to reach.
        at_least: whether the bound is a least value; else a greatest.
        note: why there is no number.
    """

    name: str
    measured: float | None
    bound: float | None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None without a verdict."""
        if self.measured is None or self.bound is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def as_json(self) -> dict[str, Any]:
        """For the record; ``of_bound`` is measured / bound."""
        ratio = None if self.measured is None or not self.bound else self.measured / self.bound
        return {
            "name": self.name,
            "measured": self.measured,
            "bound": self.bound,
            "of_bound": ratio,
            "met": self.met,
            "note": self.note,
        }


def _ratio(
    name: str, above: Any, below: Any, bound: float | None = None, *, at_least: bool = False, note: str = ""
) -> Target:
    """A target on the ratio of two numbers, either of which may be missing (None)."""
    known = above is not None and below is not None
    return Target(name, above / below if known else None, bound, at_least, note)


def _find(cases: dict[str, Any], *path: str) -> Any:
    """What lies under the keys, or None."""
    at: Any = cases
    for key in path:
        if not isinstance(at, dict) or key not in at:
            return None
        at = at[key]
    return at


def _trusted(cases: dict[str, Any], name: str, part: str = "both") -> Any:
    """Median milliseconds of a case on a GPU; None for one that computed something wrong."""
    if False in (_find(cases, name, "exact"), _find(cases, name, "finite")):
        return None
    return _find(cases, name, "ms", part, "median")


def _why(cases: dict[str, Any], name: str) -> str:
    """Why a case has no number."""
    if name not in cases:
        return f"{name}: not run"
    if "ms" in cases[name]:
        return f"{name}: its results are wrong"
    return f"{name}: {cases[name].get('error', 'no number')}"


def cpu_targets(cases: dict[str, Any]) -> list[Target]:
    """Speed and memory beside the plain loops, and what must not grow with the length."""
    found = []
    sides = sorted(name for name in cases if name.startswith("side by side/"))
    for side in sides or ["side by side"]:
        where = side.partition("/")[2]
        for rival in ("plain_loop", "plain_loop_indexed"):
            times = _find(cases, side, "times_chunkwise", rival, "median")
            name = f"forward + backward, times faster than {rival}, {where}"
            found.append(Target(name, times, FASTER, True, _why(cases, side)))
        times = _find(cases, side, "times_chunkwise", "corrected", "median")
        found.append(Target(f"corrected / stale, {where}", times, None, note=_why(cases, side)))
    ours = _find(cases, "peak memory/chunkwise", "bytes", "peak", "median")
    for rival in ("plain_loop", "plain_loop_indexed"):
        theirs = _find(cases, f"peak memory/{rival}", "bytes", "peak", "median")
        note = _why(cases, f"peak memory/{rival}")
        found.append(_ratio(f"peak memory / that of {rival}", ours, theirs, MEMORY, note=note))
    return [_settled(target) for target in found + _constant(cases)]


def _constant(cases: dict[str, Any]) -> list[Target]:
    per_token: dict[str, Any] = {
        f"time per token over lengths, slowest / fastest, {update}": _find(
            cases, "time against length", "microseconds_per_token", update
        )
        for update in ("stale", "corrected")
    }
    decode = _find(cases, "decode", "microseconds_per_token")
    per_token["decode step over positions, slowest / fastest"] = decode
    found = []
    for name, times in per_token.items():
        medians = [time["median"] for time in (times or {}).values()]
        most, least = (max(medians), min(medians)) if medians else (None, None)
        found.append(_ratio(name, most, least, CONSTANT, note="not run"))
    return found


def floors(cases: dict[str, Any], shape: Shape) -> dict[str, float] | None:
    """Milliseconds below which forward and backward cannot be, by the measured ceilings; None without them.

    The largest of staged bytes / bandwidth, arithmetic / rate, and chunks x the scan's time per chunk at one
    long sequence (left out where that was not measured).
    """
    ceilings, case = cases.get("ceilings", {}), cases.get(case_name("compress", shape), {})
    if "bytes_per_second" not in ceilings or "floor_bytes" not in case:
        return None
    latency = next(
        (
            x["microseconds_per_chunk"]
            for name, x in cases.items()
            if name.startswith("scan latency/")
            and name.endswith(f"x{shape.width}/C {shape.chunk}/{shape.update}")
            and "error" not in x
        ),
        {"forward": 0.0, "again": 0.0, "reverse": 0.0},
    )
    sequential = {"forward": latency["forward"], "backward": latency["again"] + latency["reverse"]}
    found = {}
    for part in ("forward", "backward"):
        found[part] = max(
            1e3 * case["floor_bytes"][part]["staged"] / ceilings["bytes_per_second"],
            1e3 * case["flops"][part] / ceilings["flops_per_second"],
            1e-3 * shape.chunks * sequential[part],
        )
    return found | {"both": found["forward"] + found["backward"]}


def gpu_targets(cases: dict[str, Any], plan: GpuPlan) -> list[Target]:
    """Every target of the GPU, the absolute ones first."""
    first = plan.shape(plan.shapes[0], max(plan.chunks))
    name = case_name("compress", first)
    found = []
    for part, bound in (("forward", FORWARD_MS), ("backward", BACKWARD_MS)):
        ms = _trusted(cases, name, part)
        found.append(Target(f"{part} ms at {first.name}, C {first.chunk}", ms, bound, note=_why(cases, name)))
    batch = min(plan.decode_batches)
    decode = _find(cases, f"decode/B {batch}", "microseconds", "graph", "median")
    why = _why(cases, f"decode/B {batch}")
    found.append(Target(f"decode step, microseconds per layer at B {batch}", decode, DECODE_US, note=why))
    found += [target for shape in plan.own if shape.update == "stale" for target in _at(cases, plan, shape)]
    found.append(_counted(cases, plan, "sizes with results outside the tolerances", "exact"))
    found.append(_counted(cases, plan, "sizes where two runs differ", "bitwise_repeatable"))
    return [_settled(target) for target in found]


def _counted(cases: dict[str, Any], plan: GpuPlan, name: str, key: str) -> Target:
    """How many sizes fail a check, once all have been checked."""
    checks = {own: _find(cases, own, key) for own in (case_name("compress", s) for s in plan.own)}
    missing = [own for own, check in checks.items() if check is None]
    if missing:
        return Target(name, None, 0.0, note=_why(cases, missing[0]))
    return Target(name, float(sum(not check for check in checks.values())), 0.0)


def _settled(target: Target) -> Target:
    """Without the reason why there is no number, where there is one."""
    return target if target.measured is None else dataclasses.replace(target, note="")


def _at(cases: dict[str, Any], plan: GpuPlan, shape: Shape) -> list[Target]:
    """Beside the rivals, the corrected update and the floor, forward + backward."""
    where = f"at {shape.name}, C {shape.chunk}"
    own = case_name("compress", shape)
    ours = _trusted(cases, own)
    found = []
    for rival in ("chunk_gsa", "ttt_linear"):
        name = rival_name(rival, plan.shape(_sizes(shape), _rival_chunk(plan, rival, shape)))
        theirs = _trusted(cases, name)
        note = _why(cases, own if ours is None else name)
        found.append(_ratio(f"forward + backward / {rival} {where}", ours, theirs, 1.0, note=note))
    other = case_name("compress", plan.shape(_sizes(shape), shape.chunk, "corrected"))
    corrected = _trusted(cases, other)
    note = _why(cases, own if ours is None else other)
    found.append(_ratio(f"corrected / stale {where}", corrected, ours, CORRECTED, note=note))
    floor = floors(cases, shape)
    least = None if floor is None else floor["both"]
    note = _why(cases, own if ours is None else "ceilings")
    return [*found, _ratio(f"forward + backward / floor {where}", ours, least, note=note)]


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    return shape.batch, shape.length, shape.heads, shape.width


def _rival_chunk(plan: GpuPlan, rival: str, shape: Shape) -> int:
    return shape.chunk if rival == "ttt_linear" else plan.chunks[0]
