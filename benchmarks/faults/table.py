"""What became of a row's trials, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.faults.row import Row

__all__ = ["render", "summary"]

MOST_NOTES = 8


def summary(
    row: Row, trials: Sequence[Mapping[str, Any]], stock: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """One row of the file: how many passed, what was noted how often, numbers, what stock formats did."""
    passed, of = (sum(trial[key] for trial in trials) for key in ("passed", "of"))
    notes = Counter(trial["note"] for trial in trials if trial["note"])
    seconds = sum(trial["seconds"] for trial in trials)
    return {
        "title": row.title,
        "expected": row.expected,
        "passed": passed,
        "of": of,
        "notes": dict(notes.most_common(MOST_NOTES)),
        "numbers": _numbers(trials),
        "stock": {name: dict(Counter(one["outcome"] for one in found)) for name, found in stock.items()},
        "seconds": round(seconds, 1),
    }


def _numbers(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    names = {name: None for trial in trials for name in trial["numbers"]}
    values = {
        name: [trial["numbers"][name] for trial in trials if name in trial["numbers"]] for name in names
    }
    return {
        name: {"median": round(statistics.median(all_), 4), "max": round(max(all_), 4), "count": len(all_)}
        for name, all_ in values.items()
        if all(isinstance(value, int | float) for value in all_)
    }


def render(found: Mapping[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| # | inject | expected | passed | the same on stock formats |", "|---|---|---|---|---|"]
    for number, row in sorted(found["rows"].items(), key=lambda item: int(item[0])):
        stock = "; ".join(f"{name}: {_counts(counts)}" for name, counts in row["stock"].items())
        cells = [number, row["title"], row["expected"], f"{row['passed']} of {row['of']}", stock]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {outcome}" for outcome, count in ordered)
