"""The report builder: self-contained, escaped, and its charts place points where the axes say."""

import math
import os
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis_dist.charts import Axis, bar_chart, format_tick, line_chart, tick_labels, ticks
from trellis_dist.report import Report

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted"'


def full_report() -> str:
    report = Report(HOSTILE, HOSTILE)
    report.section(HOSTILE)
    report.text(HOSTILE)
    report.facts({HOSTILE: HOSTILE})
    report.table([HOSTILE, "n"], [[HOSTILE, 1]])
    report.line_chart(HOSTILE, {HOSTILE: [(0, 1), (1, 2)]}, x_label=HOSTILE, y_label=HOSTILE)
    report.preformatted(HOSTILE)
    report.subsection(HOSTILE)
    report.bar_chart(HOSTILE, [(HOSTILE, 1, HOSTILE)])
    report.beside({HOSTILE: HOSTILE})
    return report.render()


def test_nothing_from_outside_becomes_markup():
    page = full_report()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 15


def test_the_page_is_self_contained():
    page = full_report()
    assert "Content-Security-Policy" in page
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)


def test_what_is_not_utf8_is_shown_escaped_and_can_be_saved():
    name = os.fsdecode(b"caf\xe9 \xed\xa0\x80.txt")
    report = Report(name, name)
    report.text(name)
    report.table([name], [[name]])
    report.beside({name: "\ud800 caf\u00e9"})
    page = report.render().encode().decode()
    assert page.count(r"caf\udce9 \udced\udca0\udc80.txt") == 7
    assert "\\ud800 caf\u00e9" in page


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="2 cells, its header 1"):
        Report("t").table(["a"], [[1, 2]])


def test_numbers_are_right_aligned_and_words_are_not():
    report = Report("t")
    report.table(["name", "value"], [["a", "1,024"], ["b", "97.5%"]])
    page = report.render()
    assert "<td class=number>1,024</td>" in page
    assert "<td>a</td>" in page


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e9), st.floats(1e-6, 1e9)), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
def test_every_point_lies_inside_the_plot(points, log_x, log_y):
    figure = line_chart("t", {"s": points}, x_label="x", y_label="y", log_x=log_x, log_y=log_y)
    svg = ElementTree.fromstring(re.search(r"<svg viewBox=\"0 0 720.*?</svg>", figure, re.S).group(0))
    for pair in svg.find("polyline").get("points").split():
        x, y = map(float, pair.split(","))
        assert 63.9 <= x <= 704.1
        assert 11.9 <= y <= 256.1


def test_points_that_cannot_be_drawn_are_left_out():
    figure = line_chart("t", {"s": [(0, 1), (1, math.nan), (2, 3)]}, x_label="x", y_label="y", log_x=True)
    assert figure.count("<circle") == 1
    assert "no data yet" in line_chart("t", {"s": [(0, math.inf)]}, x_label="x", y_label="y")


def test_larger_values_are_drawn_higher():
    axis = Axis(0.0, 10.0, 256.0, 12.0, log=False)
    assert axis.place(0.0) == 256.0
    assert axis.place(10.0) == 12.0
    assert axis.place(5.0) == pytest.approx(134.0)


@pytest.mark.parametrize(
    "axis, expected",
    [
        (Axis(0, 10, 0, 1, False), [0, 2, 4, 6, 8, 10]),
        (Axis(900, 70_000, 0, 1, True), [1000, 2000, 5000, 10_000, 20_000, 50_000]),
        (Axis(1, 1e6, 0, 1, True), [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
    ],
)
def test_ticks_are_round(axis, expected):
    assert ticks(axis) == pytest.approx(expected)


@pytest.mark.parametrize("value, label", [(1500, "1.5k"), (2e6, "2M"), (0.25, "0.25"), (0, "0")])
def test_tick_labels_are_short(value, label):
    assert format_tick(value) == label


@pytest.mark.parametrize(
    "values, labels",
    [
        ([0.98198, 0.982, 0.98202], ["0.98198", "0.982", "0.98202"]),
        ([10_000, 10_001], ["10k", "10.001k"]),
        ([0.5, 1], ["0.5", "1"]),
        ([], []),
    ],
)
def test_no_two_ticks_have_one_label(values, labels):
    assert tick_labels(values) == labels


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20))
def test_bars_are_as_long_as_their_values_and_none_leaves_the_page(lengths):
    figure = bar_chart("t", [(str(i), length, f"{length:g}") for i, length in enumerate(lengths)])
    widths = [float(width) for width in re.findall(r"width:([0-9.]+)%", figure)]
    assert len(widths) == len(lengths)
    assert max(widths) == (100 if max(lengths) else 0)
    for width, length in zip(widths, lengths):
        assert width == pytest.approx(100 * length / (max(lengths) or 1), abs=0.006)


def test_no_bars_are_no_error():
    assert bar_chart("t", []).count("<span") == 0


def test_no_two_of_many_lines_look_alike():
    series = {f"line {i}": [(1.0, float(i)), (2.0, float(i))] for i in range(24)}
    page = line_chart("many", series, x_label="x", y_label="y")
    looks = re.findall(r'<polyline [^>]*stroke="([^"]+)"[^>]*stroke-dasharray="([^"]*)"', page)
    assert len(looks) == 24
    assert len(set(looks)) == 24
