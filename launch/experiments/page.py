"""A page as a list of blocks, written twice: as HTML by the one report builder, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trellis_dist.charts import Difference, Point, Span
from trellis_dist.report import Report

__all__ = ["Block", "Differences", "Lines", "Page", "Section", "Table", "Text"]


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
    """A chart of lines, with intervals of some of them; ``name`` is that of its picture's file."""

    name: str
    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str
    y_label: str
    log_x: bool = True
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)


@dataclass(frozen=True)
class Differences:
    """A chart of differences to a base that the title names: bars on both sides of zero."""

    name: str
    title: str
    bars: Sequence[Difference]


Block = Section | Text | Table | Lines | Differences


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
    def charts(self) -> list[Lines | Differences]:
        """Those that hold something."""
        drawn = [block for block in self.blocks if isinstance(block, Lines | Differences)]
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
            block.title,
            block.series,
            x_label=block.x_label,
            y_label=block.y_label,
            log_x=block.log_x,
            spans=block.spans,
        )
    else:
        report.difference_chart(block.title, block.bars)


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
