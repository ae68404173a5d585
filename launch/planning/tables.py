"""The parts of a printed plan that tell of time, disk and the ways to run on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["candidate_lines", "disk_lines", "short", "time_lines", "verdict_lines"]

SHOWN = 12  # ways to run; --json has all


def short(count: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


TIED = "tied: exact, but collectives make segments wait inside a micro-batch (ZeRO 2 or 3, attention)"


def verdict_lines(own: dict[str, Any]) -> list[str]:
    """Whether it runs there."""
    used = f"{own['devices_used']} of {own['devices']} device(s)"
    if own["problem"]:
        return [own["problem"]]
    if own["fits"] is None:
        return [f"{used}; whether it fits is not checked: their memory is not known (--memory-gb)"]
    return [f"{used}; fits the memory of each"]


def time_lines(plan: dict[str, Any]) -> list[str]:
    """The step on the recipe's own mesh."""
    found = plan["prediction"]
    if found is None:
        return []
    parts = {name: seconds for name, seconds in found["step_seconds_by_part"].items() if seconds}
    shares = ", ".join(f"{name} {seconds / found['step_seconds']:.1%}" for name, seconds in parts.items())
    known = "" if found["peak_known"] else " (of bf16: tflops_fp32 is not given)"
    return [
        f"{found['device']}: {found['tflops']:g} TFLOP/s a device in {found['precision']}{known}; "
        f"matrix products are taken to reach {found['efficiency']:.0%} of it",
        f"step {found['step_seconds']:.3g} s: {shares}",
        f"{found['tokens_per_second']:,.0f} tokens/s; all {short(plan['batch']['tokens'])} tokens in "
        f"{days(found['days'])}",
        *([TIED] if found["tied"] else []),
    ]


def days(number: float) -> str:
    """Days, or hours or minutes where those say more."""
    if number >= 2:
        return f"{number:,.1f} days"
    return f"{24 * number:.1f} hours" if number >= 1 / 12 else f"{1440 * number:.1f} minutes"


def disk_lines(disk: dict[str, Any]) -> list[str]:
    """Checkpoints and token shards."""
    kept = disk["checkpoints_kept"]
    lines = [
        f"checkpoints {disk['checkpoints_bytes'] / 1e9:.2f} GB: {kept} kept and one being written, "
        f"{disk['checkpoint_bytes'] / 1e9:.2f} GB each"
    ]
    if disk["data_bytes"] is None:
        return [*lines, f"token shards {disk['bytes_per_token']} bytes a token of whatever the sources hold"]
    tokens = short(disk["data_tokens"])
    return [*lines, f"token shards {disk['data_bytes'] / 1e9:.2f} GB: up to {tokens} training tokens"]


def candidate_lines(plan: dict[str, Any]) -> list[str]:
    """A table of the fastest ways, the first one's memory and ``--set`` line, and why others are refused."""
    if "candidates" not in plan:
        return []
    found, cluster = plan["candidates"], plan["cluster"]
    known = f"{cluster['memory_gb']:.0f} GB each" if cluster["memory_gb"] else "memory not known"
    fit = "fit" if cluster["memory_gb"] else "work if they fit, which is not checked (--memory-gb)"
    lines = [
        f"{cluster['nodes']} node(s) x {cluster['devices_per_node']} x {cluster['name']}, {known}: "
        f"{len(found)} ways {fit}"
    ]
    if found:
        lines += [*_fewer(found[0], cluster), _HEADER, *(_row(one) for one in found[:SHOWN])]
        lines += [TIED] if any(one["tied"] for one in found[:SHOWN]) else []
        lines += ["", *_best(found[0])]
    return [*lines, *_refused(plan["refused"])]


def _fewer(one: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    used, there = one["devices"], cluster["total_devices"]
    if used < there:
        yield f"no way uses all {there} devices: these use {used} of {there}, the most that any does"


_HEADER = "dp x sp x tp  engine     rows  again        memory        step    tokens/s  all"


def _row(one: dict[str, Any]) -> str:
    mesh = " x ".join(str(one["mesh"][axis]) for axis in ("dp", "sp", "tp"))
    engine = one["engine"] if one["zero_stage"] is None else f"ZeRO {one['zero_stage']}"
    memory, step = one["memory_per_rank_bytes"]["total"] / 1e9, one["step_seconds"]
    return (
        f"{mesh:<14}{engine:<10}{one['micro_batch']:>5}  {one['activation_checkpointing']:<10}"
        f"{memory:>6.1f} GB{step:>10.3f} s{one['tokens_per_second']:>12,.0f}  {days(one['days'])}"
        f"{'  tied' if one['tied'] else ''}"
    )


def _best(one: dict[str, Any]) -> Iterator[str]:
    memory = one["memory_per_rank_bytes"]
    parts = {name: size for name, size in memory.items() if size and name != "total"}
    shown = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in parts.items())
    yield f"memory of the first (GB): {shown}"
    yield "to run it: " + " ".join(f"--set {setting}" for setting in one["set"])


def _refused(reasons: dict[str, int]) -> Iterator[str]:
    if reasons:
        yield ""
        yield "what does not work, and for how many of the ways tried:"
        yield from (f"{count:>6}  {reason}" for reason, count in reasons.items())
