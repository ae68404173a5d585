"""Charts of a page as PNG and SVG files, where matplotlib is installed (the extra "dev")."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from launch.experiments.page import Differences, Lines
from trellis_dist.charts import COLOURS

__all__ = ["can_draw", "draw"]

# Colours go round first, then these.
DASHES = ("-", "--", ":", "-.")


def can_draw() -> bool:
    """Whether matplotlib is there; the page has its charts in any case."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Lines | Differences, path: Path) -> list[Path]:
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
        _differences(axes, chart)
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
        for x, low, high in chart.spans.get(name, ()):
            axes.plot([x, x], [low, high], color=colour, alpha=0.45, linewidth=1.0)
    if chart.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="best")


def _differences(axes: Any, chart: Differences) -> None:
    """Bars from zero to both sides, and what is known of their spread as lines over them."""
    names, values = [bar.name for bar in chart.bars], [bar.value for bar in chart.bars]
    axes.barh(names, values, color=[COLOURS[1 if value > 0 else 0] for value in values])
    for bar in chart.bars:
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [bar.name] * 2, color="black", linewidth=1.2, marker="|")
    axes.axvline(0.0, color="black", linewidth=0.8)
    for bar in chart.bars:  # beside the axes: over a bar its line would cross them out
        axes.text(1.01, bar.name, bar.shown, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.invert_yaxis()
