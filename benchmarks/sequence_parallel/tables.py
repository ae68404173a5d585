"""A record as markdown: what the command prints at its end, and what the documentation shows.

A file's keys come sorted, so the order of rows and columns is taken from the numbers or from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.sequence_parallel.extrapolate import SCHEDULES
from benchmarks.sequence_parallel.simulate import StageTimes

__all__ = ["render"]

PART = "sequence_parallel"
DEVICES = {
    "core": "a core of this machine",
    "device": "an assumed device (400 TFLOP/s, 400 Gb/s, scan a quarter of the layer)",
}


def render(record: dict[str, Any]) -> str:
    """All tables of a record, complete or not. Raises ValueError for what is no record."""
    if not isinstance(record, dict) or record.get("part") != PART:
        raise ValueError("this is no record of python -m benchmarks.sequence_parallel")
    cases = record["cases"]
    sections = [("Bytes sent per layer and micro-batch", _bytes(cases))]
    sections += [("Stages of a layer, ms", _stages(cases.get("stages", {})))]
    sections += [("The wavefront, traced and simulated", _waves(cases))]
    sections += _extrapolations(cases.get("extrapolation", {}))
    sections += [("Two ranks against two processes alone", _throughput(cases))]
    sections += [("Peak memory of a rank in a step, MiB", _memory(cases))]
    sections += [("Longest rows within the budget", _longest(cases))]
    rows = [[name, cases[name]["error"]] for name in sorted(cases) if "error" in cases[name]]
    sections += [("Not measured", _table(["case", "why"], rows)), ("Targets", _targets(record))]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in sections if table) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) if rows else ""


def _spread(found: dict[str, float], digits: int) -> str:
    """Median (tenth - ninetieth percentile)."""
    return f"{found['median']:.{digits}f} ({found['p10']:.{digits}f} - {found['p90']:.{digits}f})"


def _bytes(cases: dict[str, Any]) -> str:
    rows = []
    for name in sorted(name for name in cases if name.startswith("bytes/")):
        case = cases[name]
        for length in sorted(case.get("lengths", {}), key=int):
            found = case["lengths"][length]
            middle = found["per_layer"][case["sp"] // 2]
            sizes = [f"{middle[kind]:.0f}" for kind in ("right", "left", "exchanged")]
            verdict = "equal" if found["equal"] else "DIFFERENT"
            once = [str(found["once_a_step"][kind]) for kind in ("summed", "scalars", "other")]
            rows.append([case["mode"], str(case["sp"]), length, *sizes, verdict, *once])
    head = ["mode", "sp", "T", "right, forward", "left, backward", "all-to-all", "formula, every rank"]
    return _table([*head, "once a step: gradients", "loss", "other"], rows)


def _stages(case: dict[str, Any]) -> str:
    if "ms" not in case:
        return ""
    names = [name for name in StageTimes.__dataclass_fields__ if name in case["ms"]]
    split = names.index("finish") + 1
    rows = []
    for phase, some in (("forward", names[:split]), ("backward", names[split:])):
        total = sum(case["ms"][name]["median"] for name in some)
        for name in some:
            share = f"{case['ms'][name]['median'] / total:.1%}"
            rows.append([phase, name.removesuffix("_back"), _spread(case["ms"][name], 1), share])
    return _table(["", f"stage, {case['length']} tokens", "time", "share"], rows)


def _waves(cases: dict[str, Any]) -> str:
    rows = []
    for name in sorted(name for name in cases if name.startswith("wavefront/")):
        case = cases[name]
        if "step_s" not in case:
            continue
        traced, simulated = (sum(case["waited"][kind]) / case["sp"] for kind in ("traced", "simulated"))
        rows.append(
            [
                name.partition("/")[2],
                f"{case['step_s']['median']:.2f} ({case['step_s']['min']:.2f} - {case['step_s']['max']:.2f})",
                f"{case['predicted']:.2f}",
                f"{case['off']:+.1%}",
                f"{case['ideal']:.2f}",
                f"{case['efficiency']:.3f}",
                f"{traced:.2f}",
                f"{simulated:.2f}",
            ]
        )
    head = ["step", "traced, s (range)", "simulated, s", "off by", "ideal, s", "of the ideal"]
    return _table([*head, "waiting, s a rank", "simulated"], rows)


def _extrapolations(case: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for device in DEVICES if "efficiency" in case else ():
        by_length, rows = case["efficiency"][device], []
        for length in sorted(by_length, key=int):
            for schedule in SCHEDULES:
                by_mesh = by_length[length][schedule]
                meshes = sorted(by_mesh, key=int)
                cells = [f"{by_mesh[sp][0]:.2f}, {by_mesh[sp][1]:.2f}" for sp in meshes]
                rows.append([length, schedule, *cells])
        title = f"Simulated, of the ideal without and with the gradient sum: {DEVICES[device]}"
        meshes = [f"sp {sp}" for sp in sorted(next(iter(by_length.values()))["in turn"], key=int)]
        found.append((title, _table(["T", "schedule", *meshes], rows)))
    return found


def _throughput(cases: dict[str, Any]) -> str:
    rows = []
    for name in sorted(name for name in cases if name.startswith("throughput/")):
        case = cases[name]
        for pair, ratio in case.get("ratio", {}).items():
            rates = [_spread(case["tokens_per_second"][who], 0) for who in (pair, "alone")]
            rows.append([pair, str(case["length"]), *rates, _spread(ratio, 3)])
    head = ["pair", "T", "tokens/s of the pair", "tokens/s of two alone", "ratio, round by round"]
    return _table(head, rows)


def _memory(cases: dict[str, Any]) -> str:
    rows = []
    for name, case in _memories(cases):
        for length in sorted(case["peak"], key=int):
            tokens = int(length) // case["sp"]
            rows.append([name, length, str(tokens), f"{case['peak'][length] / 2**20:.0f}"])
    return _table(["mesh", "T", "tokens of a rank", "peak over the state before"], rows)


def _longest(cases: dict[str, Any]) -> str:
    rows = []
    for name, case in _memories(cases):
        longest = case["longest"]
        per_token = f"{case['bytes_per_token_of_a_rank'] / 1024:.1f}"
        budget = f"{case['budget'] / 2**20:.0f}"
        rows.append([name, budget, str(longest["fits"]), str(longest["too_long"]), per_token])
    return _table(["mesh", "budget, MiB", "T fits", "T too long", "KiB per token of a rank"], rows)


def _memories(cases: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    names = sorted(name for name in cases if name.startswith("memory/") and "peak" in cases[name])
    return [(name.partition("/")[2], cases[name]) for name in names]


def _targets(record: dict[str, Any]) -> str:
    verdicts = {True: "met", False: "missed", None: "-"}
    rows = []
    for target in record.get("targets", []):
        measured = target["note"] if target["measured"] is None else f"{target['measured']:.3g}"
        bound = "-" if target["bound"] is None else f"{target['bound']:.3g}"
        verdict = "not measured" if target["measured"] is None else verdicts[target["met"]]
        rows.append([target["name"], measured, bound, verdict])
    return _table(["target", "measured", "bound", "verdict"], rows)
