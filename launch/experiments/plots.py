"""The charts of an experiment's page."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from launch.experiments.ours import Ours
from launch.experiments.page import Block, Differences, Lines, Section, Text
from launch.experiments.saturation import saturation
from launch.experiments.shares import NORMAL
from launch.experiments.tables import Chart, Point, Row
from trellis_dist.charts import Difference, Span

__all__ = ["plots"]

Series = dict[str, list[tuple[float, float]]]
FRONTIER = "frontier"


def plots(ours: Ours) -> Iterator[Block]:
    """A section with every chart; those that are one picture at this scale once."""
    seen: list[object] = []
    charts = []
    for chart in ours.expansion.experiment.charts:
        scale = ours.expansion.scale
        what = (chart.kind, [(p.x, scale.settings[p.setting], p.value) for p in chart.points])
        if what not in seen:
            charts.append(chart)
        seen.append(what)
    merged = len(charts) < len(ours.expansion.experiment.charts)
    if charts or ours.results:
        yield Section("Charts")
    for index, chart in enumerate(charts):
        title = chart.title.partition(":")[0] if merged else chart.title
        yield from _chart(ours, chart, title, name=f"chart-{index + 1}")
    yield _learning(ours)


def _chart(ours: Ours, chart: Chart, title: str, *, name: str) -> Iterator[Block]:
    if chart.kind == "bars":
        yield _bars(ours, chart, title, name=name)
        return
    lines = {"lines": _by_length, "paper": _papers, "by_row": _by_row, "pareto": _pareto}[chart.kind]
    series = {label: points for label, points in lines(ours, chart).items() if points}
    spans = {label: found for label, found in _spans(ours, chart).items() if label in series}
    log_x = chart.kind != "pareto"
    yield Lines(name, title, series, chart.x_label, chart.y_label, log_x=log_x, spans=spans)
    if chart.better:
        yield saturation(ours, chart)


def _bars(ours: Ours, chart: Chart, title: str, *, name: str) -> Block:
    """Every row minus the base: bars from zero of 1.90 and 1.93 bits look alike."""
    (point,) = chart.points
    wanted = ours.expansion.experiment.base
    base = next((row for row in ours.expansion.rows if row.name == wanted), None)
    amount = None if base is None else _at(ours, base, point)
    if base is None or amount is None:
        return Text(f"{title}: differences to the row {wanted} are drawn once it is there.")
    others = [row for row in ours.expansion.rows if row is not base]
    bars = [bar for row in others if (bar := _difference(ours, row, base, point)) is not None]
    return Differences(
        name, f"{title}, minus that of {base.title} ({amount:.4g}). {_line(ours, base, point)}", bars
    )


def _line(ours: Ours, base: Row, point: Point) -> str:
    """What the line over a bar is."""
    seeds = len(ours.values(base, point.setting, point.value))
    if seeds > 1:
        return f"Line: from the least to the largest over {seeds} paired seeds"
    if ours.share(base, point.setting, point.value) is not None:
        return "Line: 95% of the questions drawn; one seed"
    return "One seed: how far another seed moves a bar is not known"


def _difference(ours: Ours, row: Row, base: Row, point: Point) -> Difference | None:
    """Of seeds that both have, the same order of the same rows; None where there are none."""
    own, other = (ours.by_seed(one, point.setting, point.value) for one in (row, base))
    apart = [own[seed] - other[seed] for seed in own.keys() & other.keys()]
    if not apart:
        return None
    value = fmean(apart)
    ends = (min(apart), max(apart)) if len(apart) > 1 else _of_questions(ours, row, base, point, value)
    if ends is None:
        return Difference(row.title, value, f"{value:+.4f}")
    low, high = ends
    return Difference(row.title, value, f"{value:+.4f} ({low:+.4f} to {high:+.4f})", low, high)


def _of_questions(ours: Ours, row: Row, base: Row, point: Point, value: float) -> tuple[float, float] | None:
    """95% interval of a difference of accuracies, as if the two had answered different questions."""
    own, other = (ours.share(one, point.setting, point.value) for one in (row, base))
    if own is None or other is None:
        return None
    half = NORMAL * (own.error**2 + other.error**2) ** 0.5
    return value - half, value + half


def _spans(ours: Ours, chart: Chart) -> dict[str, list[Span]]:
    """Intervals of what has one, by series."""
    found: dict[str, list[Span]] = {}
    if chart.kind not in ("lines", "by_row"):
        return found
    for row in ours.expansion.rows:
        for point in chart.points:
            x = float(_tokens(ours, point)) if chart.kind == "lines" else row.x
            if x is not None and (ends := ours.interval(row, point.setting, point.value)) is not None:
                found.setdefault(row.title if chart.kind == "lines" else point.label, []).append((x, *ends))
    return found


def _at(ours: Ours, row: Row, point: Point) -> float | None:
    return ours.mean(row, point.setting, point.value)


def _by_length(ours: Ours, chart: Chart) -> Series:
    return {
        row.title: [
            (float(_tokens(ours, point)), value)
            for point in chart.points
            if (value := _at(ours, row, point)) is not None
        ]
        for row in ours.expansion.rows
    }


def _tokens(ours: Ours, point: Point) -> int:
    """Of a prompt where the value names its length, else of the context that was trained on."""
    scale = ours.expansion.scale
    return scale.prompt(point.x) if f"{{{point.x}}}" in point.value else scale.lengths[point.x]


def _papers(ours: Ours, chart: Chart) -> Series:
    """At the paper's own lengths."""
    from launch.experiments.tables import read_scale

    lengths = read_scale("paper").lengths
    group = next(group for group in ours.expansion.experiment.groups if group.paper)
    places = {(column.setting, column.value): i for i, column in enumerate(group.columns)}
    return {
        row.title: [
            (float(lengths[point.x]), row.paper[place])
            for point in chart.points
            if (place := places[point.setting, point.value]) < len(row.paper)
        ]
        for row in ours.expansion.rows
    }


def _by_row(ours: Ours, chart: Chart) -> Series:
    return {
        point.label: sorted(
            (row.x, value)
            for row in ours.expansion.rows
            if row.x is not None and (value := _at(ours, row, point)) is not None
        )
        for point in chart.points
    }


def _pareto(ours: Ours, chart: Chart) -> Series:
    """A point for each row, and the line through those that no other row beats in both."""
    found = {row.title: [_at(ours, row, point) for point in chart.points] for row in ours.expansion.rows}
    places = {label: (x, y) for label, (x, y) in found.items() if x is not None and y is not None}
    frontier: Series = {FRONTIER: _frontier(list(places.values()))} if places else {}
    return frontier | {label: [place] for label, place in places.items()}


def _frontier(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places whose y is larger than that of all with a smaller or equal x, by x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def _learning(ours: Ours) -> Block:
    """Training losses over tokens, of the first seed on the first of the runs that are shown."""
    experiment, scale = ours.expansion.experiment, ours.expansion.scale
    shown = scale.settings[experiment.settings()[0]]
    series = {}
    for row in ours.expansion.rows:
        for result in ours.of(row, shown)[:1]:
            per_step = result["training"]["tokens"] / result["training"]["steps"]
            series[row.title] = [(s * per_step, loss) for s, loss in result["training"]["train_losses"]]
    title = f"Training loss, run {shown}"
    return Lines("learning", title, series, "tokens", "nats per token", log_x=False)
