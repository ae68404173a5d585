"""An experiment's results as a page: ours beside the paper's, bits per byte, what was trained, charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from launch.experiments.expand import Expansion
from launch.experiments.page import Bars, Block, Lines, Page, Section, Table, Text
from launch.experiments.tables import Chart, Column, Group, Point, Row
from launch.experiments.values import value_of

__all__ = ["NOT_COMPARABLE", "make_page", "write_page"]

NOT_COMPARABLE = "other corpus and tokenizer, not comparable"
# More columns than this and the paper's stand in a table of their own.
SIDE_BY_SIDE = 3
# Nats below the bigram from which on models are ranked.
MARGIN = 0.2

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Ours:
    """The numbers of an expansion's rows, from the results that there are (run -> result)."""

    expansion: Expansion
    results: Results

    def values(self, row: Row, setting: str, value: str) -> list[float]:
        """One for each seed that has it."""
        if setting in row.without:
            return []
        return [
            found
            for result in self.of(row, self.expansion.scale.settings[setting])
            if (found := value_of(result, self.expansion.scale.expand(value))) is not None
        ]

    def mean(self, row: Row, setting: str, value: str) -> float | None:
        """Over the seeds."""
        found = self.values(row, setting, value)
        return fmean(found) if found else None

    def of(self, row: Row, run: str) -> list[Mapping[str, Any]]:
        """Results of a row's run, by seed."""
        specs = self.expansion.specs
        names = [specs[key].name for seed in self.expansion.seeds if (key := (row.name, run, seed)) in specs]
        return [self.results[name] for name in names if name in self.results]


def make_page(expansion: Expansion, results: Results) -> Page:
    """The page of what is there."""
    experiment, ours = expansion.experiment, Ours(expansion, results)
    missing = [spec.name for spec in expansion.specs.values() if spec.name not in results]
    blocks: list[Block] = [
        Text(experiment.setting),
        Text(_here(expansion)),
        *_changed(expansion),
        *([Text(f"Not there yet: {', '.join(missing)}.")] if missing else []),
        *_near_the_bigram(results),
        *_absent(expansion),
        *_groups(ours),
        *_bits_per_byte(ours),
        *_charts(ours),
        *_what_was_trained(ours),
    ]
    done = len(expansion.specs) - len(missing)
    subtitle = f"trellis reproduce {expansion.name} --scale {expansion.scale_name}: {done} of "
    return Page(experiment.title, subtitle + f"{len(expansion.specs)} runs are there", blocks)


def write_page(page: Page, folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME.html, NAME.md and its pictures (PNG and SVG), and return their paths."""
    from launch.experiments.pictures import draw
    from trellis_dist.files import atomic_write, make_directories

    make_directories(folder)
    drawn = {chart.name: draw(chart, folder / f"{name}-{chart.name}") for chart in page.charts}
    html, markdown = folder / f"{name}.html", folder / f"{name}.md"
    atomic_write(html, page.html())
    atomic_write(markdown, page.markdown({chart: files[0].name for chart, files in drawn.items() if files}))
    return [html, markdown, *(path for files in drawn.values() for path in files)]


def _here(expansion: Expansion) -> str:
    scale = expansion.scale
    return (
        f"Here, at scale '{expansion.scale_name}': {scale.about}. Baselines stand in the same block and have "
        "the parameters of Trellis (within 2%, by the width of the MLP), the same tokens in the same order "
        "and the same recipe; none was tuned for this table."
    )


def _changed(expansion: Expansion) -> list[Text]:
    """What the command line changed of that."""
    if not expansion.overrides:
        return []
    return [Text(f"Changed by --set: {', '.join(expansion.overrides)}.")]


def _near_the_bigram(results: Results) -> list[Text]:
    """Runs among which a ranking says how fast n-grams are learned, and no more."""
    both = {
        name: (found["validation"]["loss"], found["validation"]["bigram"]["loss"])
        for name, found in results.items()
        if "bigram" in found.get("validation", {})
    }
    near = [name for name, (model, bigram) in both.items() if model > bigram - MARGIN]
    if not near:
        return []
    return [
        Text(
            f"No ranking: {len(near)} of {len(both)} runs are not {MARGIN} nats per token below an "
            f"interpolated bigram counted on the same text ({', '.join(near)}); train for longer."
        )
    ]


def _absent(expansion: Expansion) -> list[Text]:
    if not expansion.absent:
        return []
    listed = ", ".join(f"{row} ({kind})" for row, kind in expansion.absent.items())
    return [Text(f"Left out, because this version has no such layer kind: {listed}.")]


def _groups(ours: Ours) -> Iterator[Block]:
    """Every group once: at a small scale several of them may come to the same runs."""
    seen: list[object] = []
    kept: list[tuple[Group, list[tuple[Column, str]]]] = []
    for group in ours.expansion.experiment.groups:
        columns = _columns(ours, group)
        what = [(ours.expansion.scale.settings[column.setting], column.value) for column, _ in columns]
        if what not in seen:
            kept.append((group, columns))
        seen.append(what)
    merged = len(kept) < len(ours.expansion.experiment.groups)
    for group, columns in kept:
        title = group.title.partition(":")[0] if merged else group.title
        yield Section(title)
        yield from _tables(ours, group, columns)


def _columns(ours: Ours, group: Group) -> list[tuple[Column, str]]:
    """The columns with what each shows here; those that are one number here become one."""
    scale = ours.expansion.scale
    found: dict[tuple[str, str], list[Column]] = {}
    for column in group.columns:
        key = (scale.settings[column.setting], scale.expand(column.value))
        found.setdefault(key, []).append(column)
    return [
        (columns[0], " = ".join(column.label for column in columns) + _own(ours, columns[0]))
        for columns in found.values()
    ]


def _own(ours: Ours, column: Column) -> str:
    """The tokens that a length of the paper's label is here, where they differ."""
    scale = ours.expansion.scale
    named = [name for name in scale.lengths if f"{{{name}}}" in column.value]
    if "(" in column.value and len(named) > 1:
        return ""
    if named:
        return f" (here {scale.prompt(named[0]):,})"
    length = column.setting.rpartition("-")[2]
    context = scale.lengths.get(length)
    same_label = length.upper() in column.label.upper()
    return f" (here {context:,})" if context is not None and same_label else ""


def _tables(ours: Ours, group: Group, columns: Sequence[tuple[Column, str]]) -> Iterator[Block]:
    rows = ours.expansion.rows
    if not group.paper:
        yield _table(ours, "", columns)
        return
    if len(columns) > SIDE_BY_SIDE or len(columns) < len(group.columns):
        yield _table(ours, "Ours", columns)
        header = ["", *(column.label for column in group.columns)]
        cells = [[row.title, *_paper(ours, row, len(group.columns))] for row in rows]
        yield Table(f"The paper's: {NOT_COMPARABLE}", header, cells)
        return
    both = [name for _, label in columns for name in (f"{label}, ours", f"the paper's ({NOT_COMPARABLE})")]
    mixed = []
    for row in rows:
        pairs = zip(_cells(ours, row, columns), _paper(ours, row, len(columns)))
        mixed.append([row.title, *(cell for pair in pairs for cell in pair)])
    yield Table("", ["", *both], mixed)


def _table(ours: Ours, title: str, columns: Sequence[tuple[Column, str]]) -> Table:
    rows = [[row.title, *_cells(ours, row, columns)] for row in ours.expansion.rows]
    return Table(title, ["", *(label for _, label in columns)], rows)


def _cells(ours: Ours, row: Row, columns: Sequence[tuple[Column, str]]) -> list[str]:
    return [_cell(ours.values(row, column.setting, column.value)) for column, _ in columns]


def _paper(ours: Ours, row: Row, count: int) -> list[str]:
    """With the decimals that the paper's table has."""
    printed = (value for each in ours.expansion.experiment.rows for value in each.paper)
    decimals = max(len(repr(value).partition(".")[2]) for value in printed)
    return [*(f"{value:.{decimals}f}" for value in row.paper), *[""] * (count - len(row.paper))]


def _cell(values: Sequence[float]) -> str:
    """The mean over seeds, and their standard deviation where there are several."""
    if not values:
        return ""
    spread = f" +- {_number(stdev(values))}" if len(values) > 1 else ""
    return _number(fmean(values)) + spread


def _number(value: float) -> str:
    if abs(value) >= 1000 or (value >= 100 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _bits_per_byte(ours: Ours) -> Iterator[Block]:
    """Of every run, with the bigram counted on the same training text under them."""
    scale, shown = ours.expansion.scale, ours.expansion.experiment.settings()
    runs = list(dict.fromkeys(scale.settings[setting] for setting in shown))
    rows = []
    for row in ours.expansion.rows:
        cells = [
            _cell([r["validation"]["bits_per_byte"] for r in ours.of(row, run) if "validation" in r])
            for run in runs
        ]
        rows.append([row.title, *cells])
    bigram = [_bigram(ours, run) for run in runs]
    yield Section("Bits per byte of our held-out text (lower is better; comparable between tokenizers)")
    yield Table("", ["", *(f"run {run}" for run in runs)], [*rows, ["interpolated bigram", *bigram]])


def _bigram(ours: Ours, run: str) -> str:
    for row in ours.expansion.rows:
        for result in ours.of(row, run):
            if "bigram" in result.get("validation", {}):
                return _cell([result["validation"]["bigram"]["bits_per_byte"]])
    return ""


def _charts(ours: Ours) -> Iterator[Block]:
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
        yield _chart(ours, chart, title, name=f"chart-{index + 1}")
    yield _learning(ours)


def _chart(ours: Ours, chart: Chart, title: str, *, name: str) -> Block:
    if chart.kind == "bars":
        found = {row.title: _at(ours, row, chart.points[0]) for row in ours.expansion.rows}
        return Bars(name, title, {label: value for label, value in found.items() if value is not None})
    lines = {"lines": _by_length, "paper": _papers, "by_row": _by_row, "pareto": _pareto}[chart.kind]
    series = {label: points for label, points in lines(ours, chart).items() if points}
    return Lines(name, title, series, chart.x_label, chart.y_label, log_x=chart.kind != "pareto")


def _at(ours: Ours, row: Row, point: Point) -> float | None:
    return ours.mean(row, point.setting, point.value)


def _by_length(ours: Ours, chart: Chart) -> dict[str, list[tuple[float, float]]]:
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


def _papers(ours: Ours, chart: Chart) -> dict[str, list[tuple[float, float]]]:
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


def _by_row(ours: Ours, chart: Chart) -> dict[str, list[tuple[float, float]]]:
    return {
        point.label: sorted(
            (row.x, value)
            for row in ours.expansion.rows
            if row.x is not None and (value := _at(ours, row, point)) is not None
        )
        for point in chart.points
    }


def _pareto(ours: Ours, chart: Chart) -> dict[str, list[tuple[float, float]]]:
    found = {row.title: [_at(ours, row, point) for point in chart.points] for row in ours.expansion.rows}
    return {label: [(x, y)] for label, (x, y) in found.items() if x is not None and y is not None}


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


def _what_was_trained(ours: Ours) -> Iterator[Block]:
    header = [
        "run",
        "parameters",
        "tokens",
        "state bytes",
        "MFLOPs/token",
        "us/token",
        "hours",
        "layers with",
        "commit",
    ]
    rows = [
        _facts(ours.results[spec.name]) for spec in ours.expansion.specs.values() if spec.name in ours.results
    ]
    if not rows:
        return
    yield Section("What was trained")
    yield Table("", header, rows)
    places = sorted({str(result["machine"]["processor"]) for result in ours.results.values()})
    yield Text(
        "State bytes after one row of training length; FLOPs forward and backward; time per token is the "
        f"median over logged steps while other runs shared the machine. Trained on: {', '.join(places)}."
    )


def _facts(result: Mapping[str, Any]) -> list[str]:
    training, model = result["training"], result["model"]
    seconds = training["seconds_per_token"]
    return [
        result["name"],
        f"{model['parameters']:,}",
        f"{training['tokens']:,}",
        f"{model['state_bytes']:,}",
        f"{model['flops_per_token'] / 1e6:,.2f}",
        "" if seconds is None else f"{seconds * 1e6:,.1f}",
        f"{training['seconds'] / 3600:,.2f}",
        ", ".join(result["recipe"]["model"]["pattern"]),
        _commit(result["commit"]),
    ]


def _commit(commit: str | None) -> str:
    """Short, with the mark of uncommitted changes."""
    head, mark, _ = (commit or "").partition("+")
    return head[:12] + mark
