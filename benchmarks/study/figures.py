"""The study's plots: loss by position, and what each change to Trellis does."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.plan import plan

__all__ = ["draw"]

Row = Mapping[str, Any]
WIDTH, DOTS = 7.0, 130


def draw(
    rows: Sequence[Row], ablations: Sequence[Row], *, begin: Path, ours: str, noise: float | None
) -> list[Path]:
    """BEGIN-positions.png and BEGIN-ablations.png, of what there is; within ``noise`` is noise."""
    drawn = []
    if rows:
        drawn.append(_positions(rows, begin.with_name(f"{begin.name}-positions.png"), ours))
    if ablations:
        drawn.append(_ablations(ablations, begin.with_name(f"{begin.name}-ablations.png"), noise))
    return drawn


def _positions(rows: Sequence[Row], path: Path, ours: str) -> Path:
    """A line per model over the ranges of positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.2), dpi=DOTS, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        edges = [max(int(edge), 32) for edge in row["by_position"]]
        width = 2.6 if row["group"] == ours else 1.2
        title = row["title"].strip("*")
        axes.plot(edges, list(row["by_position"].values()), marker="o", markersize=3, lw=width, label=title)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("first position of the range (tokens of context before it)")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    return path


def _ablations(rows: Sequence[Row], path: Path, noise: float | None) -> Path:
    """A grey bar per change, of one seed, with its interval over books; to the left of 0 it helps.

    The band is what counts as noise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.2 + 0.34 * len(rows)), dpi=DOTS, layout="constrained")
    axes = figure.subplots()
    places, tokens = range(len(rows))[::-1], plan()["sizes"]["tuning_tokens"]
    values = [row["estimate"] for row in rows]
    below = [row["estimate"] - row["low"] for row in rows]
    above = [row["high"] - row["estimate"] for row in rows]
    axes.barh(places, values, xerr=[below, above], color="#999", height=0.7, error_kw={"lw": 0.8})
    if noise is not None:
        axes.axvspan(-noise, noise, color="#36c", alpha=0.15, lw=0)
    titles = (f"{row['of'].removeprefix('trellis-')}: {row['title']}" for row in rows)
    axes.set_yticks(places, [textwrap.fill(title, 44) for title in titles], fontsize=7)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel(
        f"nats per token more than what it changes\n(one seed, {tokens / 1e6:g}M tokens; band: noise)",
        fontsize=8,
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    return path
