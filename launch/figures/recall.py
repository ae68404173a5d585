"""The part of a figures page on recall: accuracies, and what memories kept against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.experiments.page import Block, Lines, Section, Table, Text

__all__ = ["recall_blocks"]

Numbers = Mapping[str, Any]
_TITLES = {
    "needle": ("Single needles in noise, preferred to nine other numbers", "tokens"),
    "mqar": ("Multi-query recall (chance: one of the row's own values)", "pairs/tokens"),
}
# Heads that a table shows: those with the largest |r|.
SHOWN = 12
# More lines than this and their intervals would hide one another.
WITH_SPANS = 3


def recall_blocks(found: Mapping[str, Numbers]) -> Iterator[Block]:
    """Of needles and of multi-query recall."""
    yield Section("Recall, and what memories kept")
    for name, of_task in found.items():
        title, groups = _TITLES[name]
        header = [groups, "items", "percent right (95% interval)", "chance"]
        yield Table(title, header, [_accuracy(row) for row in of_task["accuracy"]])
        if "retention" in of_task:
            yield from _retention(name, title, of_task["retention"])
    if any("retention" in of_task for of_task in found.values()):
        yield Text(
            "Retention is the sum of log beta over the tokens between what has to be kept and its question: "
            "the logarithm of the share of it that a head's memory still holds. These are correlations over "
            "items of one model: they do not say that a gate caused an answer."
        )


def _accuracy(row: Numbers) -> list[str]:
    shown = f"{row['percent']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
    mark = "" if row["low"] > row["chance"] else " not distinguishable from chance"
    return [row["group"], str(row["items"]), shown + mark, f"{row['chance']:.3g}"]


def _retention(name: str, title: str, found: Numbers) -> Iterator[Block]:
    if found["reason"]:
        yield Text(f"Retention against recall: nothing to correlate, {found['reason']}.")
        return
    if not found["looked_at"]:
        yield Text("Retention against recall: no head forgets more of one item than of another.")
        return
    heads = sorted(found["heads"], key=lambda head: -abs(head["r"]))
    yield Table(
        f"correlation of retention with being right, {', '.join(found['groups'])}",
        ["", "r (95% interval of this one alone)", "p among all"],
        [_head(head) for head in heads[:SHOWN]],
    )
    yield Text(
        f"{found['looked_at']} correlations were looked at, the {min(SHOWN, len(heads))} largest are shown. "
        "p: how often any of them is as large when the answers are shuffled within each length; read an "
        "interval only where p is small."
    )
    yield _by_part(name, title, found["layers"])


def _head(head: Numbers) -> list[str]:
    place = f"layer {head['layer']}, head {head['head']}, {head['pass']}"
    return [place, f"{head['r']:+.2f} ({head['low']:+.2f} to {head['high']:+.2f})", f"{head['p']:.3g}"]


def _by_part(name: str, title: str, layers: Sequence[Numbers]) -> Block:
    """Accuracy by quarter of the items, of each layer the mean over its heads."""
    lines = {f"layer {one['layer']}": list(enumerate(one["parts"], 1)) for one in layers}
    series = {label: [(float(n), part["percent"]) for n, part in parts] for label, parts in lines.items()}
    spans = {label: [(float(n), p["low"], p["high"]) for n, p in parts] for label, parts in lines.items()}
    return Lines(
        f"recall-{name}",
        f"{title}: by what was kept, from the least quarter to the most",
        series,
        x_label="quarter of the items by retention, mean over heads",
        y_label="percent right",
        log_x=False,
        spans=spans if len(spans) <= WITH_SPANS else {},
    )
