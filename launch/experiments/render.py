"""An experiment's results as a page: ours beside the paper's, bits per byte, what was trained, charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from launch.experiments.expand import Expansion
from launch.experiments.ours import Ours, Results
from launch.experiments.page import Block, Page, Section, Table, Text
from launch.experiments.plots import plots
from launch.experiments.shares import share_of
from launch.experiments.tables import Column, Group, Row
from launch.experiments.values import is_old
from launch.figures.steps import steps_blocks

__all__ = ["NOT_COMPARABLE", "make_page", "write_page"]

NOT_COMPARABLE = "other corpus and tokenizer, not comparable"
# More columns than this and the paper's stand in a table of their own.
SIDE_BY_SIDE = 3
# Nats below the bigram from which on models are ranked.
MARGIN = 0.2
ONE_LEFT = (
    "Of {name} one checkpoint is left: another table trained it. To see the others remove its folder under "
    "runs/ and its file under results/, and run the command again."
)
SHARED = (
    "tokens/s is the median over the logged steps of training. Runs that --jobs trained side by side shared "
    "the machine with one another: compare it only between runs of one --jobs 1."
)


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
        *_notes(ours),
        *_bits_per_byte(ours),
        *plots(ours),
        *_through_training(ours),
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


def _notes(ours: Ours) -> Iterator[Text]:
    """What stands in the cells, of the kinds of cells that are there."""
    shown = [c.value for group in ours.expansion.experiment.groups for c in group.columns]
    names = [ours.expansion.scale.expand(value) for value in shown]
    if any(share_of(result, name) for result in ours.results.values() for name in names):
        yield Text(
            "Accuracies stand with Wilson's 95% interval over the prompts or questions, the same for every "
            "row and seed. * not distinguishable from chance: the interval holds what a guess gets "
            "(of MQAR one of the row's own values, of 4 pairs 25%); such numbers rank nothing."
        )
    if any("probe(" in name for name in names):
        yield Text(
            "Looks into the memories: mean over those in the second half of training and over layers; se: "
            "standard error over the looks of one run. The variance of the gradient's norm is that between "
            "neighbouring logged steps of the same half, without the trend that the schedule makes."
        )
        yield from _old(ours)
    if "tokens_per_second" in names:
        yield Text(SHARED)


def _old(ours: Ours) -> Iterator[Text]:
    if old := [name for name, result in ours.results.items() if is_old(result)]:
        yield Text(
            f"Of the last look alone, with the trend in the variance: {', '.join(old)}, whose results were "
            "written by an earlier version; remove those files under results/ and run the command again, "
            "which trains nothing anew."
        )


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
    return [_number_of(ours, row, column) for column, _ in columns]


def _number_of(ours: Ours, row: Row, column: Column) -> str:
    """An accuracy with its interval, looks with the standard error of one run, else as `_cell` has it."""
    where = (row, column.setting, column.value)
    if (share := ours.share(*where)) is not None:
        return str(share)
    values, error = ours.values(*where), ours.error(*where)
    if len(values) == 1 and error is not None:
        return f"{_number(values[0])} (se {_number(error)})"
    return _cell(values)


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


def _through_training(ours: Ours) -> Iterator[Block]:
    """Gates and memories at the checkpoints of each row's first seed, of an experiment that looks at them."""
    if not ours.expansion.experiment.trace:
        return
    setting = ours.expansion.experiment.settings()[0]
    for row in ours.expansion.rows:
        for result in ours.of(row, ours.expansion.scale.settings[setting])[:1]:
            yield Section(f"Through training: {row.title}")
            found = result.get("checkpoints", {"steps": []})
            if found["steps"]:
                yield from steps_blocks(found["steps"], found["layers"], prefix=f"{row.name}-")
            else:
                yield Text(ONE_LEFT.format(name=result["name"]))


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
