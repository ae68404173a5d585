"""The project's targets against a record."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.kernels.targets import Target

__all__ = ["all_targets"]

DP, SP, OF_IDEAL, PREDICTED = 0.85, 0.8, 0.9, 0.15
LAYERS, RANKS = 24, 8  # of the target for a whole step


def all_targets(cases: dict[str, Any]) -> list[Target]:
    """Every target, in the order of the cases."""
    found = [_bytes(name, case) for name, case in cases.items() if name.startswith("bytes/")]
    waves = {name: case for name, case in cases.items() if name.startswith("wavefront/")}
    found += [target for name, case in waves.items() for target in _wave(name, case)]
    for name, case in cases.items():
        if name.startswith("throughput/"):
            found += _throughput(name, case)
    longest = {name: _longest(case) for name, case in cases.items() if name.startswith("memory/")}
    one, four = longest.get("memory/sp 1"), longest.get("memory/sp 4")
    times = four / one if one and four else None
    found.append(Target("longest T at sp 4 / at sp 1, same budget of a rank", times, None, True, "not run"))
    return [x if x.measured is None else dataclasses.replace(x, note="") for x in found]


def _bytes(name: str, case: dict[str, Any]) -> Target:
    lengths = case.get("lengths", {})
    off = [length for length, found in lengths.items() if not found["equal"]]
    title = f"{name.partition('/')[2]}: lengths whose bytes differ from the formula"
    return Target(title, float(len(off)) if lengths else None, 0.0, note=case.get("error", "not run"))


def _wave(name: str, case: dict[str, Any]) -> list[Target]:
    title, note = name.partition("/")[2], case.get("error", "not run")
    off = abs(case["off"]) if "off" in case else None
    found = [Target(f"{title}: simulated beside traced time, off by", off, PREDICTED, note=note)]
    if case.get("sp") == RANKS and case.get("layers") == LAYERS:
        title = f"{title}: of the ideal time"
        found.append(Target(title, case["efficiency"], OF_IDEAL, True))
    return found


def _throughput(name: str, case: dict[str, Any]) -> list[Target]:
    bound = DP if name.startswith("throughput/dp") else SP
    if "ratio" not in case:
        return [Target(f"{name} / two alone", None, bound, True, case.get("error", "not run"))]
    return [
        Target(f"{pair}, T {case['length']} / two alone", ratio["median"], bound, True)
        for pair, ratio in case["ratio"].items()
    ]


def _longest(case: dict[str, Any]) -> int:
    return int(case.get("longest", {}).get("fits", 0))
