"""A record of the data benchmark as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["render"]


def render(data: dict[str, Any]) -> str:
    """Tables of what was measured, then the targets."""
    cases = data["cases"]
    parts = [
        *_encoding(cases),
        *_stages(cases),
        *_others(cases),
        *_loader(cases),
        *_thirty(data),
        *_targets(data),
    ]
    return "\n".join(parts)


def _table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    columns = list(head)
    yield f"\n{title}\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    yield from ("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _encoding(cases: dict[str, Any]) -> Iterator[str]:
    found = {kind: cases.get(f"encode {kind}", {}) for kind in ("bpe", "unigram")}
    rows = [
        (
            kind,
            f"{case['input_bytes'] / 1e9:.2f} GB",
            f"{case['ceiling']['seconds']:.0f} s",
            f"{case['tokenise_and_shard_s']:.0f} s ({case['of_ceiling']:.2f})",
            f"{case['first_task_to_last_commit_s']:.0f} s ({case['whole_of_ceiling']:.2f})",
            f"{case['script']['seconds']:.0f} s ({case['of_script']:.2f}x)",
            f"{case['mb_s_core']:.1f}",
        )
        for kind, case in found.items()
        if "of_ceiling" in case
    ]
    head = (
        "32,000 pieces",
        "text",
        "bare encoding",
        "tokenise + shard",
        "whole job",
        "plain script",
        "MB/s per core",
    )
    yield from _table(
        "Encoding, two processes (in brackets: bare encoding's time over this one's)", head, rows
    )


def _stages(cases: dict[str, Any]) -> Iterator[str]:
    case = cases.get("all stages", {})
    if "shares" not in case:
        return
    rows = [(name, f"{case['stages'][name]:.1f}", f"{share:.1%}") for name, share in case["shares"].items()]
    title = f"All stages on {case['input_bytes'] / 1e9:.2f} GB: {case['mb_s_core']:.2f} MB/s per core"
    yield from _table(title, ("stage", "seconds", "share"), rows)
    parts = [(name, f"{seconds * 1e3:.0f}") for name, seconds in case["of_clean"].items()]
    yield from _table("Parts of clean, one process", ("part", "CPU ms per MB"), parts)


def _others(cases: dict[str, Any]) -> Iterator[str]:
    rows = []
    if "found" in (case := cases.get("deduplicate", {})):
        seconds = case["stages"]["deduplicate"]
        rows.append((f"{case['documents']:,} documents, copies planted", _copies(case["planted"])))
        rows.append(("found", _copies(case["found"])))
        rows.append(
            (
                "seconds: fingerprints with the text's cleaning, then the search",
                f"{case['stages']['clean']:.0f}, {seconds:.0f}",
            )
        )
        rows.append(("largest process, MiB", case["largest_mib"]))
    if "growth" in (case := cases.get("memory", {})):
        sizes = " and ".join(
            f"{case[name]['worker_mib']} MiB at {case[name]['input_bytes'] / 1e6:.0f} MB"
            for name in ("small", "large")
        )
        rows.append(("largest worker, all stages", sizes))
    if "equal" in (case := cases.get("kills", {})):
        rows.append(
            (
                f"{case['kills']} SIGKILLs, data sets equal to the undisturbed one",
                f"{case['equal']} of {case['data_sets']}",
            )
        )
        same = case["same_for_workers"]
        rows.append(
            (
                f"equal with {' and '.join(same)} workers",
                ", ".join("yes" if equal else "no" for equal in same.values()),
            )
        )
    yield from _table("Duplicates, memory, kills", ("what", "measured"), rows)


def _copies(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _loader(cases: dict[str, Any]) -> Iterator[str]:
    rows = [
        (
            name,
            f"{row['tokens_per_second'] / 1e6:.1f}",
            f"{row['positions_that_predict']:.1%}",
            f"{row['index_seconds']:.2f} s",
            "{without_imports:.3f} / {with_start_and_imports:.2f} s".format(**row["first_batch_seconds"]),
        )
        for name, row in cases.get("loader", {}).get("packings", {}).items()
    ]
    if checked := cases.get("loader", {}).get("first_batch_with_hashes_checked_seconds"):
        both = "{without_imports:.2f} / {with_start_and_imports:.2f} s".format(**checked)
        rows.append(("after every shard's hash was checked", "", "", "", both))
    head = (
        "packing, multiples of",
        "Mtok/s per core",
        "positions that predict",
        "index",
        "first batch, without / with imports",
    )
    yield from _table("Loader: 1B tokens, T 2,048", head, rows)


def _thirty(data: dict[str, Any]) -> Iterator[str]:
    found = data.get("extrapolation", {})
    if not found:
        return
    hours = ", ".join(f"{hours:.1f} h on {cores} cores" for cores, hours in found["hours_by_cores"].items())
    disk = ", ".join(
        f"{name} {size:.0f}"
        for name, size in sorted(found["disk_gb"].items(), key=lambda item: -item[1])
        if size >= 0.5
    )
    yield f"\n30B tokens, all stages: {found['text_gb']:.0f} GB of text, {found['core_hours']:.1f} core-hours"
    yield f"({hours}); disk {found['disk_gb_total']:.0f} GB ({disk})."


def _targets(data: dict[str, Any]) -> Iterator[str]:
    rows = []
    for target in data.get("targets", []):
        measured = "-" if target["measured"] is None else f"{target['measured']:.3g}"
        verdict = {True: "met", False: "missed", None: target.get("note") or "-"}[target["met"]]
        rows.append((target["name"], measured, target["bound"], verdict))
    yield from _table("Targets", ("what", "measured", "bound", ""), rows)
