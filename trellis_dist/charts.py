"""Line charts as inline SVG, bars as HTML: no script, no assets, readable in light and dark.

Bars of amounts begin at zero (`bar_chart`); where what counts is by how much values differ, bars are of the
differences to one of them, on both sides of zero (`difference_chart`).

Coordinates are in SVG user units; a chart is 720 x 300 and scales with the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Difference", "Point", "Span", "bar_chart", "difference_chart", "line_chart"]

Point = tuple[float, float]
# A name, a length, and the length as it is shown.
Bar = tuple[str, float, str]
# A place on the x axis, and the two ends of an interval there.
Span = tuple[float, float, float]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44
# Distinguishable under the common colour-vision deficiencies (Okabe and Ito), dark enough on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 4")


@dataclass(frozen=True)
class Axis:
    """Maps data to user units along one direction; ``log`` needs positive data."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        """Position of ``value`` in user units."""
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (x - low) / (high - low)


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    spans: Mapping[str, Sequence[Span]] | None = None,
) -> str:
    """One SVG figure with a legend below it.

    Args:
        title: caption and accessible name.
        series: name -> points (x, y); points not finite (or not positive on a log axis) are left out.
        x_label, y_label: axis titles with their units.
        log_x, log_y: logarithmic axes.
        spans: of some series intervals (x, low, high), drawn upright in its colour.

    Returns:
        HTML; every string is escaped. Without a drawable point, a sentence that says so.
    """
    kept = {name: [p for p in points if _drawable(p, log_x, log_y)] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return f"<figure><figcaption>{escape(title)}: no data yet</figcaption></figure>"
    drawn = {name: _drawn(found, log_x, log_y) for name, found in (spans or {}).items() if name in kept}
    ends = [end for found in drawn.values() for _, low, high in found for end in (low, high)]
    x = _axis([p[0] for points in kept.values() for p in points], log_x, (LEFT, WIDTH - RIGHT))
    y = _axis([*(p[1] for points in kept.values() for p in points), *ends], log_y, (HEIGHT - BOTTOM, TOP))
    body = _grid(x, y) + _titles(x_label, y_label)
    body += "".join(_spans(drawn.get(name, ()), x, y, index) for index, name in enumerate(kept))
    body += "".join(_line(points, x, y, index) for index, points in enumerate(kept.values()))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{_legend(list(kept))}</figure>"


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars below one another, the longest as wide as there is room.

    Args:
        title: caption.
        bars: name, length (0 or more) and the length as it is shown.

    Returns:
        HTML that :mod:`trellis_dist.report` styles; every string is escaped.
    """
    longest = max((length for _, length, _ in bars), default=0.0)
    rows = "".join(_bar(name, length / longest if longest else 0.0, shown) for name, length, shown in bars)
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{rows}</div></figure>'


def _bar(name: str, share: float, shown: str) -> str:
    bar = f'<span class="bar" style="width:{100 * share:.2f}%;background:{COLOURS[0]}"></span>'
    return f"<span>{escape(name)}</span><span>{bar}</span><span>{escape(shown)}</span>"


@dataclass(frozen=True)
class Difference:
    """A bar beside zero.

    Attributes:
        name: of what is compared with the base.
        value: how much more it has than the base; less than zero: how much less.
        shown: the difference as text.
        low, high: ends of an interval or a range that is drawn over the bar; None without one.
    """

    name: str
    value: float
    shown: str
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """Everything of it that has to lie on the chart."""
        return tuple(end for end in (self.value, self.low, self.high) if end is not None)


def difference_chart(title: str, bars: Sequence[Difference]) -> str:
    """Horizontal bars from a common zero to the left or the right; the farthest end takes all the room.

    Returns:
        HTML that :mod:`trellis_dist.report` styles; every string is escaped.
    """
    ends = [end for bar in bars for end in bar.ends if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    axis = Axis(low, high if high > low else low + 1.0, 0.0, 100.0, log=False)
    rows = "".join(_beside_zero(bar, axis) for bar in bars if math.isfinite(bar.value))
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{rows}</div></figure>'


def _beside_zero(bar: Difference, axis: Axis) -> str:
    colour = COLOURS[1] if bar.value > 0 else COLOURS[0]
    track = _stretch("bar", axis, 0.0, bar.value, f";background:{colour}")
    track += f'<span class="zero" style="left:{axis.place(0.0):.2f}%"></span>'
    if bar.low is not None and bar.high is not None and math.isfinite(bar.low + bar.high):
        track += _stretch("span", axis, bar.low, bar.high)
    return (
        f'<span>{escape(bar.name)}</span><span class="track">{track}</span><span>{escape(bar.shown)}</span>'
    )


def _stretch(name: str, axis: Axis, one: float, other: float, style: str = "") -> str:
    left, right = sorted((axis.place(one), axis.place(other)))
    return f'<span class="{name}" style="left:{left:.2f}%;width:{right - left:.2f}%{style}"></span>'


def _drawable(point: Point, log_x: bool, log_y: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)


def _drawn(spans: Sequence[Span], log_x: bool, log_y: bool) -> list[Span]:
    return [s for s in spans if _drawable(s[:2], log_x, log_y) and math.isfinite(s[2])]


def _axis(values: list[float], log: bool, span: tuple[float, float]) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.15, high * 1.15, *span, log=True)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    # A quantity that is never negative is not drawn below zero.
    return Axis(max(low - pad, 0.0) if low >= 0 else low - pad, high + pad, *span, log=False)


def ticks(axis: Axis) -> list[float]:
    """Round values inside the axis: powers of ten (or 1-2-5 inside few decades), or steps of 1, 2 or 5."""
    if axis.log:
        return _log_ticks(axis.low, axis.high)
    raw = (axis.high - axis.low) / 5
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw)
    first = math.ceil(axis.low / step - 1e-9)
    return [step * i for i in range(first, math.floor(axis.high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]


def format_tick(value: float, digits: int = 3) -> str:
    """A short label: 1,500 as 1.5k, 2,000,000 as 2M, small values with three digits."""
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.{digits + 1}g}{suffix}"
    return f"{value:.{digits}g}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """Of an axis: with the fewest digits, three or more, that tell its ticks apart."""
    for digits in range(3, 15):
        labels = [format_tick(value, digits) for value in values]
        if len(set(labels)) == len(values):
            break
    return labels


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    across, upright = ticks(x), ticks(y)
    for value, label in zip(across, tick_labels(across)):
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_label(at, HEIGHT - BOTTOM + 16, label, "middle"))
    for value, label in zip(upright, tick_labels(upright)):
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_label(LEFT - 8, at + 4, label, "end"))
    return "".join(parts)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _titles(x_label: str, y_label: str) -> str:
    middle = (HEIGHT - BOTTOM + TOP) / 2
    turn = f'transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle"'
    return (
        _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle")
        + f"<text {turn}>{escape(y_label)}</text>"
    )


def _line(points: Sequence[Point], x: Axis, y: Axis, index: int) -> str:
    path = " ".join(f"{x.place(px):.1f},{y.place(py):.1f}" for px, py in points)
    line = f'<polyline points="{path}" fill="none" {_stroke(index)}/>'
    return line + (_dots(points, x, y, COLOURS[index % len(COLOURS)]) if len(points) <= 12 else "")


def _stroke(index: int) -> str:
    turn = index // len(COLOURS)  # the seventh series is no second first
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[(index + turn) % len(DASHES)]
    return f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'


def _dots(points: Sequence[Point], x: Axis, y: Axis, colour: str) -> str:
    circles = []
    for px, py in points:
        at = f'cx="{x.place(px):.1f}" cy="{y.place(py):.1f}"'
        circles.append(f'<circle {at} r="3" fill="{colour}"><title>{px:,.6g}: {py:,.6g}</title></circle>')
    return "".join(circles)


def _spans(spans: Sequence[Span], x: Axis, y: Axis, index: int) -> str:
    lines = []
    for px, low, high in spans:
        at = f'x1="{x.place(px):.1f}" x2="{x.place(px):.1f}" y1="{y.place(low):.1f}" y2="{y.place(high):.1f}"'
        shown = f"<title>{px:,.6g}: {low:,.6g} to {high:,.6g}</title>"
        lines.append(
            f'<line {at} stroke="{COLOURS[index % len(COLOURS)]}" stroke-opacity=".45">{shown}</line>'
        )
    return "".join(lines)


def _legend(names: list[str]) -> str:
    items = []
    for index, name in enumerate(names):
        line = f'<line x1="0" x2="28" y1="4" y2="4" {_stroke(index)}/>'
        items.append(f'<li><svg class="key" viewBox="0 0 28 8">{line}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
