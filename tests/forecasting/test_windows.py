"""Files, splits and windows: against a loop, and against the counts that others published."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from tests.forecasting.series_files import etth1, exchange, waves, write_csv
from trellis_dist.forecasting.series import Series, read_series
from trellis_dist.forecasting.windows import Windows, borders_of, split


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    values = waves(9, channels=3)
    dated = read_series(write_csv(tmp_path / "dated.csv", values))
    plain = read_series(write_csv(tmp_path / "plain.csv", values, date=False))
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress((tmp_path / "plain.csv").read_bytes()))
    assert dated.names == ("C0", "C1", "C2")
    assert plain.names == ("0", "1", "2")
    for series in (dated, plain, read_series(tmp_path / "packed.csv.gz")):
        assert torch.equal(series.values, values)


def test_one_column_is_a_series(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("load\n1\n2.5\n")
    series = read_series(tmp_path / "one.csv")
    assert (series.names, series.values.tolist()) == (("load",), [[1.0], [2.5]])


@pytest.mark.parametrize(
    "text,names",
    [
        (
            "date,0,1,OT\nx,1,2,3\nx,4,5,6\n",
            ("0", "1", "OT"),
        ),  # as Exchange, Electricity and Traffic are published
        ("date,0,1\n2020-01-01,1,2\n2020-01-02,4,5\n", ("0", "1")),
        (",a,b\n0,1,2\n1,4,5\n", ("a", "b")),  # with an index, as pandas writes it
        ("timestamp,a\n1700000000,1\n1700003600,4\n", ("a",)),
        ("2020-01-01,1,2\n2020-01-02,4,5\n", ("0", "1")),
        ("\ufeff1,2\n4,5\n", ("0", "1")),
        ("\ufeffdate,a\nx,1\nx,4\n", ("a",)),
    ],
)
def test_headers_dates_and_indices_are_recognised(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    series = read_series(tmp_path / "a.csv")
    assert series.names == names
    assert series.values[:, 0].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    "text,message",
    [
        ("a,b\n,5\n3,6\n", "line 2: '' is no finite number"),
        ("1,nan\n3,6\n", "line 1: 'nan' is no finite number"),
        (",0,1\n0,1,2\n", "line 1: '' is no finite number"),
        ("date,a\nx,1\nx,2,3\n", "line 3: 3 fields where 2 are expected"),
        ("date,a\nx,1\n\nx,nan\n", "line 4: 'nan' is no finite number"),
        ("date,a\nx,1\nx,\n", "line 3: '' is no finite number"),
        ("date,a\n", "holds no rows"),
        ("", "holds no rows"),
        ("date\nx\n", "line 2: 1 fields where 2 are expected"),
    ],
)
def test_what_is_no_series_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "a.csv")


def test_no_file_and_no_gzip_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_series(tmp_path / "none.csv")
    whole = gzip.compress(bytes(range(256)) * 40)
    for damaged in (b"1,2\n", whole[:40] + bytes(8) + whole[48:]):
        (tmp_path / "a.csv.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read as CSV"):
            read_series(tmp_path / "a.csv.gz")
    with pytest.raises(ValueError, match="is a folder; give the path of a CSV file"):
        read_series(tmp_path)


def test_windows_are_those_of_a_loop() -> None:
    values = waves(60, channels=2)
    parts = split(Series(("a", "b"), values), (30, 12, 18), look_back=7, horizon=3)
    mean, deviation = values[:30].mean(0), values[:30].var(0, correction=0).sqrt()
    scaled = (values - mean) / deviation
    # Forecast steps of a part: every three in a row that lie in it whole.
    for part, (first, last) in zip(
        (parts.train, parts.validation, parts.test), ((7, 30), (30, 42), (42, 60))
    ):
        naive = [(scaled[t - 7 : t], scaled[t : t + 3]) for t in range(first, last - 3 + 1)]
        x, y = part.batch(torch.arange(len(part)))
        assert len(part) == len(naive)
        torch.testing.assert_close(x, torch.stack([pair[0] for pair in naive]).float())
        torch.testing.assert_close(y, torch.stack([pair[1] for pair in naive]).float())
    x, _ = parts.test.batch(torch.tensor([3, 0, 3]))
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])


def test_scales_are_of_the_training_rows_and_a_constant_channel_is_shifted() -> None:
    values = torch.stack([torch.full((40,), 5.0), torch.arange(40.0)], -1).double()
    lone = torch.full((40, 1), 0.1, dtype=torch.float64)  # whose mean is rounded
    lone[30:] = 0.2
    assert split(Series(("a",), lone), (30, 5, 5), look_back=4, horizon=2).deviation.tolist() == [1.0]
    parts = split(Series(("a", "b"), values), (20, 10, 10), look_back=4, horizon=2)
    assert parts.train.rows[:, 0].abs().max() == 0
    assert float(parts.train.rows[:, 1].mean()) == pytest.approx(0, abs=1e-6)
    assert float(parts.train.rows[:, 1].std(correction=0)) == pytest.approx(1)
    assert (parts.mean.tolist(), parts.deviation[0].item()) == ([5.0, 9.5], 1.0)


# What DLinear's code prints for ETTh1 at 336 steps (train 8209, val 2785, test 2785), and the sizes of
# Exchange that TimesNet (arXiv 2210.02186, table 6) and its successors give, at 96 steps.
@pytest.mark.parametrize(
    "dataset,look_back,expected", [("etth1", 336, (8209, 2785, 2785)), ("exchange", 96, (5120, 665, 1422))]
)
def test_counts_are_the_published_ones(
    tmp_path: Path, dataset: str, look_back: int, expected: tuple[int, int, int]
) -> None:
    series = read_series((etth1 if dataset == "etth1" else exchange)(tmp_path))
    borders = borders_of(len(series.values), dataset=dataset)
    counts = split(series, borders, look_back=look_back, horizon=96).counts()
    assert tuple(counts.values()) == expected
    assert series.values.shape[1] == (7 if dataset == "etth1" else 8)


def test_short_parts_and_wrong_shares_are_refused() -> None:
    series = Series(("a",), waves(60, channels=1))
    with pytest.raises(ValueError, match=r"validation part has 19 rows, too few for one window of 7 \+ 13"):
        split(series, (30, 12, 18), look_back=7, horizon=13)
    with pytest.raises(ValueError, match="30 training rows are fewer than look_back = 31"):
        split(series, (30, 12, 18), look_back=31, horizon=1)
    with pytest.raises(ValueError, match="60 rows are fewer than the 14400 of etth1"):
        borders_of(60, dataset="etth1")
    for shares in ((0.7, 0.1, 0.1), (1.2, -0.4, 0.2)):
        with pytest.raises(ValueError, match="three positive shares"):
            borders_of(60, dataset="csv", fractions=shares)


def test_a_batch_is_a_copy_of_rows_that_are_not_copied() -> None:
    rows = torch.arange(20.0).view(10, 2)
    x, y = Windows(rows, 3, 2).batch(torch.tensor([4]))
    assert (x[0].tolist(), y[0].tolist()) == (rows[4:7].tolist(), rows[7:9].tolist())
