"""What follows from the measurements: targets, and what 30B tokens would take."""

from __future__ import annotations

from typing import Any

from benchmarks.kernels.targets import Target

__all__ = ["all_targets", "extrapolation"]

TOKENS = 30e9
CORES = (16, 256)
OF_CEILING, OF_SCRIPT, MB_S_CORE, LONG_ENOUGH = 0.85, 1.0, 1.0, 60.0
DEDUP_MIB, GROWTH = 2048.0, 1.1
MTOK_S, FIRST_BATCH = 10.0, 1.0


def all_targets(cases: dict[str, Any]) -> list[Target]:
    """Every target; one that was not measured says why."""
    found = []
    for kind in ("bpe", "unigram"):
        case = _case(cases, f"encode {kind}")
        note = case.get("error", "not run")
        title = f"{kind}: tokenise + shard"
        found += [
            Target(f"{title}, of bare encoding", case.get("of_ceiling"), OF_CEILING, True, note),
            Target(f"{title}, times the plain script", case.get("of_script"), OF_SCRIPT, True, note),
            Target(f"{title}, seconds", case.get("tokenise_and_shard_s"), LONG_ENOUGH, True, note),
        ]
    stages, dedup, memory, kills, loader = (
        _case(cases, name) for name in ("all stages", "deduplicate", "memory", "kills", "loader")
    )
    found.append(Target("all stages, MB/s per core", stages.get("mb_s_core"), MB_S_CORE, True, "not run"))
    found.append(
        Target(
            "deduplication, MiB of the largest process", dedup.get("largest_mib"), DEDUP_MIB, note="not run"
        )
    )
    found.append(Target("worker memory, ten times the input", memory.get("growth"), GROWTH, note="not run"))
    unequal = kills["data_sets"] - kills["equal"] if "equal" in kills else None
    found.append(Target("data sets that differ after kills", unequal, 0.0, note="not run"))
    for name, row in loader.get("packings", {}).items():
        rate, first = row["tokens_per_second"] / 1e6, row["first_batch_seconds"]["without_imports"]
        found.append(Target(f"loader, {name}, Mtok/s per core", rate, MTOK_S, True))
        found.append(Target(f"loader, {name}, first batch after the imports, s", first, FIRST_BATCH))
    return found


def _case(cases: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = cases.get(name, {})
    return found


def extrapolation(cases: dict[str, Any]) -> dict[str, Any]:
    """30B tokens with all stages on, from the measured seconds and bytes per token; linear in the tokens.

    What the driver does alone (plan, account) and Ray's tasks are taken to divide over the cores; disk and
    network are taken to keep up: 256 cores read and write some GB/s.
    """
    case = _case(cases, "all stages")
    if "tokens" not in case:
        return {}
    times = TOKENS / case["tokens"]
    core_hours = case["whole_s"] * case["processes"] * times / 3600
    disk = {name: size * times / 1e9 for name, size in case["disk_bytes"].items()}
    return {
        "tokens": TOKENS,
        "text_gb": case["input_bytes"] * times / 1e9,
        "core_hours": core_hours,
        "hours_by_cores": {str(cores): core_hours / cores for cores in CORES},
        "disk_gb": disk,
        "disk_gb_total": sum(disk.values()),
    }
