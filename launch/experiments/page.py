"""A page as a list of blocks, written twice: as HTML by the one report builder, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trellis_dist.charts import Point
from trellis_dist.report import Report

__all__ = ["Bars", "Block", "Lines", "Page", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Section:
    """A heading."""

    title: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; cells as they are shown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Lines:
    """A chart of lines; ``name`` is that of its picture's file."""

    name: str
    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str
    y_label: str
    log_x: bool = True


@dataclass(frozen=True)
class Bars:
    """A chart of bars, the shorter the better or not: the caption says it."""

    name: str
    title: str
    bars: Mapping[str, float]


Block = Section | Text | Table | Lines | Bars


@dataclass(frozen=True)
class Page:
    """Title, a line under it, and what follows."""

    title: str
    subtitle: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """One self-contained document."""
        report = Report(self.title, self.subtitle)
        for block in self.blocks:
            _add(report, block)
        return report.render()

    def markdown(self, pictures: Mapping[str, str] | None = None) -> str:
        """The same; of the charts those that have a file in ``pictures`` (name -> path beside the page)."""
        parts = [f"# {self.title}", self.subtitle]
        parts += [text for block in self.blocks if (text := _markdown(block, pictures or {}))]
        return "\n\n".join(parts) + "\n"

    @property
    def charts(self) -> list[Lines | Bars]:
        """Those that hold something."""
        drawn = [block for block in self.blocks if isinstance(block, Lines | Bars)]
        return [block for block in drawn if (block.series if isinstance(block, Lines) else block.bars)]


def _add(report: Report, block: Block) -> None:
    if isinstance(block, Section):
        report.section(block.title)
    elif isinstance(block, Text):
        report.text(block.text)
    elif isinstance(block, Table):
        if block.title:
            report.subsection(block.title)
        report.table(block.header, block.rows)
    elif isinstance(block, Lines):
        report.line_chart(
            block.title, block.series, x_label=block.x_label, y_label=block.y_label, log_x=block.log_x
        )
    else:
        report.bar_chart(block.title, [(name, value, f"{value:.4g}") for name, value in block.bars.items()])


def _markdown(block: Block, pictures: Mapping[str, str]) -> str:
    if isinstance(block, Section):
        return f"## {block.title}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Table):
        head = [f"**{block.title}**\n"] if block.title else []
        rule = "|" + "|".join(["---"] + ["---:"] * (len(block.header) - 1)) + "|"
        return "\n".join([*head, _row(block.header), rule, *map(_row, block.rows)])
    return f"![{block.title}]({pictures[block.name]})" if block.name in pictures else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
