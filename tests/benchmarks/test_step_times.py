"""The benchmark of step times runs, and its file stays small and readable."""

from __future__ import annotations

from pathlib import Path

from benchmarks import step_times
from trellis_dist.files import read_json


def test_it_records_every_step_of_every_rank() -> None:
    times = step_times.record(2, "local", 3)
    assert [len(rank) for rank in times] == [3, 3]
    assert all(0 < microseconds < 60e6 for rank in times for microseconds in rank)


def test_the_file_has_a_line_for_each_rank(tmp_path: Path) -> None:
    runs = {"2 ranks": [[1, 2], [3, 4]], "1 rank": [[5]]}
    result = {"machine": {"cores": 2}, "unit": "microseconds", "runs": runs}
    step_times.write(tmp_path / "a.json", result)
    assert read_json(tmp_path / "a.json") == result
    assert "\n   [1,2],\n   [3,4]]" in (tmp_path / "a.json").read_text()
