"""Charts of a page as PNG and SVG files, where matplotlib is installed (the extra "dev")."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from launch.experiments.page import Bars, Lines
from trellis_dist.charts import COLOURS

__all__ = ["can_draw", "draw"]

# Colours go round first, then these.
DASHES = ("-", "--", ":", "-.")


def can_draw() -> bool:
    """Whether matplotlib is there; the page has its charts in any case."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Lines | Bars, path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg and return them; nothing without matplotlib."""
    if not can_draw():
        return []
    from matplotlib.figure import Figure

    rows = len(chart.series) if isinstance(chart, Lines) else len(chart.bars)
    figure = Figure(figsize=(7.5, max(3.6, 0.32 * rows + 1.2)), dpi=130, layout="constrained")
    axes = figure.subplots()
    if isinstance(chart, Lines):
        _lines(axes, chart)
    else:
        _bars(axes, chart)
    axes.set_title(chart.title, fontsize=10, wrap=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file)
    return files


def _lines(axes: Any, chart: Lines) -> None:
    for index, (name, points) in enumerate(chart.series.items()):
        style = DASHES[index // len(COLOURS) % len(DASHES)]
        marker = "o" if len(points) <= 12 else None
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*points), style, color=colour, marker=marker, markersize=4, label=name)
    if chart.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="best")


def _bars(axes: Any, chart: Bars) -> None:
    names = list(chart.bars)
    drawn = axes.barh(names, list(chart.bars.values()), color=COLOURS[0])
    axes.bar_label(drawn, [f"{value:.4g}" for value in chart.bars.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
