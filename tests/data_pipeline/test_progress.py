"""What a person sees of a running job."""

from __future__ import annotations

import re

import pytest

from data_pipeline import progress
from data_pipeline.progress import Bar


def test_the_bar_has_rates_time_left_and_what_was_left_out(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("clean", 4, shown=True) as bar:
        bar.count({"documents": 10**6, "bytes": 10**9}, reused=True)
        bar.restart()
        now[0] += 2.0
        bar.count({"documents": [300, 20], "bytes": 5_000_000, "tokens": [3_000_000, 0], "quarantined": 1})
        bar.count({"documents": 680, "bytes": 1_000_000, "quarantined": 2})
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(r"data: clean: +75% 3/4 \[\d\d:\d\d<[\d:?]+\]", last), last
    assert "500 documents/s, 3.0 MB/s, 1.50 Mtok/s, 3 quarantined, 1 re-used" in last


def test_nothing_is_shown_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    with Bar("clean", 4, shown=False) as bar:
        bar.count({"documents": 1, "bytes": 1})
    assert capfd.readouterr() == ("", "")
