"""The one HTML report builder, used by every room.

A report is a single file that opens anywhere: inline style and SVG, no script, no asset from a network. Every
string that comes in is escaped, and a content security policy forbids script should one slip through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

from trellis_dist.charts import Bar, Difference, Point, Span, bar_chart, difference_chart, line_chart

__all__ = ["Report"]

CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de; --page: #fff;
        --soft: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9da7b1; --line: #30363d; --page: #0d1117; --soft: #161b22;
          --link: #79c0ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; font: 16px/1.55 system-ui, sans-serif;
       color: var(--ink); background: var(--page); }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.subtitle, figcaption { color: var(--muted); }
p { max-width: 46rem; }
figure { margin: 1.25rem 0; }
figcaption { font-weight: 600; margin-bottom: .35rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); }
svg .grid { stroke: var(--line); stroke-width: 1; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .25rem 0 0 4rem;
          padding: 0; font-size: .875rem; }
.legend svg.key { display: inline-block; width: 28px; height: 8px; margin-right: .4rem;
                  vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: .875rem; }
td.number, th.number { text-align: right; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem 1.25rem;
     margin: 1rem 0; }
dt { color: var(--muted); font-size: .875rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
a { color: var(--link); overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .9rem;
      overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 13px/1.5 ui-monospace, monospace; }
.bars { display: grid; grid-template-columns: fit-content(40%) 1fr auto; gap: .3rem .75rem;
        align-items: center; font-size: .875rem; font-variant-numeric: tabular-nums; }
.bars > :nth-child(3n) { text-align: right; }
.bar { display: block; height: .8rem; border-radius: 2px; }
.track { position: relative; height: .8rem; }
.track > span { position: absolute; top: 0; }
.track > .zero { top: -.3rem; bottom: -.3rem; border-left: 1px solid var(--muted); }
.track > .span { top: .35rem; border-top: 2px solid var(--ink); }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
          gap: 0 1rem; }
.beside > div { min-width: 0; }
.beside p { margin: .5rem 0 0; color: var(--muted); font-size: .875rem; }
.beside pre { margin-top: .25rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; }
  svg text { font-size: 18px; }
  dl { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
  table { font-size: .8125rem; }
  th { font-size: .75rem; }
  th, td { padding-right: .7rem; }
}
"""


class Report:
    """Builds one page from top to bottom.

    Args:
        title: page title and first heading.
        subtitle: one line under it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def section(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def subsection(self, title: str) -> None:
        """Start a part of a section."""
        self._parts.append(f"<h3>{escape(title)}</h3>")

    def text(self, paragraph: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add a grid of named values, the figures a reader looks for first."""
        items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        self._parts.append(f"<dl>{items}</dl>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; numbers are right-aligned and shown as given (format them before).

        Raises:
            ValueError: a row's length differs from the header's.
        """
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a table row has {len(row)} cells, its header {len(header)}: {list(row)!r}")
        numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
        head = "".join(_cell("th", name, number) for name, number in zip(header, numeric))
        body = "".join(
            "<tr>" + "".join(map(_cell, ["td"] * len(row), row, numeric)) + "</tr>" for row in rows
        )
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def line_chart(
        self,
        title: str,
        series: Mapping[str, Sequence[Point]],
        *,
        x_label: str,
        y_label: str,
        log_x: bool = False,
        log_y: bool = False,
        spans: Mapping[str, Sequence[Span]] | None = None,
    ) -> None:
        """Add a chart; arguments as in :func:`trellis_dist.charts.line_chart`."""
        self._parts.append(
            line_chart(title, series, x_label=x_label, y_label=y_label, log_x=log_x, log_y=log_y, spans=spans)
        )

    def bar_chart(self, title: str, bars: Sequence[Bar]) -> None:
        """Add bars; arguments as in :func:`trellis_dist.charts.bar_chart`."""
        self._parts.append(bar_chart(title, bars))

    def difference_chart(self, title: str, bars: Sequence[Difference]) -> None:
        """Add bars beside zero; arguments as in :func:`trellis_dist.charts.difference_chart`."""
        self._parts.append(difference_chart(title, bars))

    def beside(self, texts: Mapping[str, str]) -> None:
        """Add texts exactly as they are, title -> text, side by side where the page is wide enough."""
        items = (f"<div><p>{escape(k)}</p><pre>{escape(v)}</pre></div>" for k, v in texts.items())
        self._parts.append(f'<div class="beside">{"".join(items)}</div>')

    def links(self, files: Mapping[str, str]) -> None:
        """Add a list of files, path relative to the page -> a remark such as the size."""
        items = "".join(
            f'<li><a href="{escape(quote(path))}">{escape(path)}</a> ({escape(remark)})</li>'
            for path, remark in files.items()
        )
        self._parts.append(f"<ul>{items}</ul>")

    def preformatted(self, text: str) -> None:
        """Add text exactly as it is: a sample, a log, a configuration."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def render(self) -> str:
        """The whole page as one self-contained HTML document; lone surrogates are shown as ``\\udce9``."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{escape(CSP)}">'
            f"<title>{escape(self._title)}</title><style>{STYLE}</style>"
        )
        body = "\n".join(self._parts)
        page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
        # A file name that is not UTF-8 has lone surrogates in Python: they would fail when the page is saved.
        return page.encode(errors="backslashreplace").decode()


def _is_number(cell: object) -> bool:
    text = str(cell).replace(",", "").rstrip("%x").strip()
    try:
        float(text)
    except ValueError:
        return text in {"", "-"}
    return True


def _cell(tag: str, value: object, number: bool) -> str:
    return f"<{tag}{' class=number' if number else ''}>{escape(str(value))}</{tag}>"
