"""The part of a page on saved checkpoints: gates and memories by position, one curve for each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from launch.experiments.page import Block, Lines, Table, Text

__all__ = ["steps_blocks"]

Numbers = Mapping[str, Any]
NAMES = {
    "gate": ("Forget gate of the key pass", "beta"),
    "key_norm": ("Norm of the key memory", "|S|"),
    "value_norm": ("Norm of the value memory", "|R|"),
}
KINDS = {
    "prose": "a long text",
    "items": "reasoning items",
    "beside": "stretches of prose as long as the items",
}
# Checkpoints from which on a correlation over them is given.
LEAST = 5


def steps_blocks(found: Sequence[Numbers], layers: Sequence[int], *, prefix: str = "") -> Iterator[Block]:
    """Of what `launch.figures.training.at_checkpoints` found; ``prefix`` tells pictures of one page apart."""
    kinds = [kind for kind in KINDS if kind in found[0]]
    names = [name for name in NAMES if name != "gate" or _forgets(found, kinds)]
    for name in names:
        yield _by_step(found, layers, kinds, name, prefix)
    for kind in kinds:
        for place in sorted({0, len(layers) - 1}):
            for name in names:
                yield _by_position(found, kind, name, place, layers[place], prefix)
    yield from _recall(found, layers)


def _forgets(found: Sequence[Numbers], kinds: Sequence[str]) -> bool:
    """Whether any gate ever closed: a chart of ones says nothing."""
    return any(min(row[kind]["gate"]) < 1.0 for row in found for kind in kinds)


def _by_step(
    found: Sequence[Numbers], layers: Sequence[int], kinds: Sequence[str], name: str, prefix: str
) -> Block:
    """Means over a text by step, a curve for each layer and kind of text."""
    title, label = NAMES[name]
    series = {
        f"layer {layer}, {kind}": [(float(row["step"]), row[kind][name][place]) for row in found]
        for place, layer in enumerate(layers)
        for kind in kinds
        if kind != "beside"
    }
    return Lines(f"{prefix}steps-{name}", title, series, x_label="step", y_label=label, log_x=False)


def _by_position(
    found: Sequence[Numbers], kind: str, name: str, place: int, layer: int, prefix: str
) -> Block:
    title, label = NAMES[name]
    series = {}
    for row in found:
        seen = row[kind]["positions"]
        series[f"step {row['step']:,}"] = list(zip(map(float, seen["ends"]), seen[name][place]))
    return Lines(
        f"{prefix}positions-{kind}-{name}-{layer}",
        f"{title} by position in {KINDS[kind]}, layer {layer}",
        series,
        x_label="tokens read",
        y_label=label,
        log_x=False,
    )


def _recall(found: Sequence[Numbers], layers: Sequence[int]) -> Iterator[Block]:
    """Needles by step, and whether what is kept of them goes with how many are found."""
    rows = [
        [
            f"{row['step']:,}",
            f"{fmean(row['prose']['gate']):.4f}",
            f"{row['needle']['percent']:.0f} ({row['needle']['low']:.0f} to {row['needle']['high']:.0f})",
            *(f"{kept:.3f}" for kept in row["retention"]),
        ]
        for row in found
    ]
    header = ["step", "beta on prose, all layers", "needles right, % (95%; chance 10)"]
    kept = [f"retention, layer {layer}" for layer in layers]
    yield Table("Needles at 512 tokens, and the mean over heads of the log of what was kept of them",
                [*header, *kept], rows)  # fmt: skip
    if (reason := _nothing_to_correlate(found)) is not None:
        yield Text(reason)
        return
    cells = [[f"layer {layer}", *_correlations(found, place)] for place, layer in enumerate(layers)]
    yield Table(f"retention against needles right, over {len(found)} checkpoints",
                ["", "r", "r of the changes from one to the next"], cells)  # fmt: skip
    yield Text(
        "Checkpoints of one run are in the order of training: r may be that both follow the step; the "
        f"changes are free of a steady trend, but they are {len(found) - 1}."
    )


def _nothing_to_correlate(found: Sequence[Numbers]) -> str | None:
    needles = [row["needle"] for row in found]
    if all(one["low"] <= one["chance"] for one in needles):
        return "No checkpoint finds needles above chance: there is nothing to correlate over them."
    if max(one["low"] for one in needles) <= min(one["high"] for one in needles):
        return "No checkpoint finds more needles than another beyond their intervals: nothing to correlate."
    if all(min(row["retention"]) == 0 for row in found):
        return "Nothing is forgotten: what is kept goes with nothing."
    if len(found) < LEAST:
        return f"{len(found)} checkpoints: a correlation over fewer than {LEAST} says nothing."
    return None


def _correlations(found: Sequence[Numbers], place: int) -> list[str]:
    import numpy as np

    kept = np.array([row["retention"][place] for row in found])
    right = np.array([row["needle"]["percent"] for row in found])
    pairs = ((kept, right), (np.diff(kept), np.diff(right)))
    return [f"{np.corrcoef(x, y)[0, 1]:+.2f}" if np.ptp(x) > 0 and np.ptp(y) > 0 else "" for x, y in pairs]
