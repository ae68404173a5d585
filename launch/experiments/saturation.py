"""From which size on more of it buys nothing that can be told, or that this cannot be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from launch.experiments.ours import Ours
from launch.experiments.page import Table
from launch.experiments.tables import Chart, Point

__all__ = ["saturation"]

# 97.5% quantiles of Student's t by the number of seeds; the normal distribution's from eight on.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45}
NORMAL = 1.96
UNKNOWN = "cannot be told"


@dataclass(frozen=True)
class Size:
    """A row: x, mean over seeds, a 95% interval if any is known, whether a guess may do as well."""

    x: float
    value: float
    interval: tuple[float, float] | None
    guessed: bool


def saturation(ours: Ours, chart: Chart) -> Table:
    """For each number of the chart the smallest x within the 95% interval of the best, or why none."""
    rows = [[point.label, *_one(ours, chart, point)] for point in chart.points]
    title = f"Saturation: the smallest of {chart.x_label} within the 95% interval of the best"
    return Table(title, ["", chart.x_label, "best"], rows)


def _one(ours: Ours, chart: Chart, point: Point) -> tuple[str, str]:
    sizes = _sizes(ours, point)
    if len(sizes) < 2:
        return UNKNOWN, "too few rows are there"
    best = (min if chart.better == "less" else max)(sizes, key=lambda size: size.value)
    if best.guessed:
        return UNKNOWN, "no row is distinguishable from chance"
    if best.interval is None:
        return UNKNOWN, "one seed: how far another would move it is not known"
    low, high = best.interval
    shown = f"{best.value:.4g} ({low:.4g} to {high:.4g}) at {best.x:g}"
    least = min(size.x for size in sizes if low <= size.value <= high)
    if least == sizes[-1].x:
        return "not reached", f"{shown}, the largest: all others are outside"
    if least == sizes[0].x:
        return UNKNOWN, f"{shown}: {least:g}, the smallest, is already within that"
    return f"{least:g}", shown


def _sizes(ours: Ours, point: Point) -> list[Size]:
    """By x."""
    found = []
    for row in ours.expansion.rows:
        values = ours.values(row, point.setting, point.value)
        if row.x is None or not values:
            continue
        share = ours.share(row, point.setting, point.value)
        interval = (share.low, share.high) if share is not None else _over_seeds(values)
        guessed = share is not None and not share.above_chance
        found.append(Size(row.x, fmean(values), interval, guessed))
    return sorted(found, key=lambda size: size.x)


def _over_seeds(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    half = STUDENT.get(len(values), NORMAL) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half
