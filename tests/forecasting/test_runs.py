"""Runs in folders: resumed to the same bits, read back, refused where they are others; the real ETTh1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.forecasting.series_files import etth1, wave_data
from trellis_dist.files import read_json
from trellis_dist.forecasting import runs
from trellis_dist.forecasting.models import ForecastTraining
from trellis_dist.forecasting.runs import Case, cases_of, load_model, open_data, run_case, run_cases
from trellis_dist.forecasting.series import Series
from trellis_dist.forecasting.training import errors_of

CASE = Case("trellis", 6, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ForecastTraining(batch_size=16, windows=48, validation_every=4, epochs=3)
    monkeypatch.setattr(runs, "training_of", lambda *_, **__: settings)


class Clock:
    """Passes the deadline at its ``last`` reading."""

    def __init__(self, last: int) -> None:
        self.readings = 0
        self.last = last

    def __call__(self) -> float:
        self.readings += 1
        return 1.0 if self.readings >= self.last else 0.0


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = wave_data()
    whole = run_case(CASE, data, tmp_path / "whole")
    for _ in range(2):  # an epoch a start
        assert run_case(CASE, data, tmp_path / "parts", deadline=1.0, clock=Clock(2)) is None
    parts = run_case(CASE, data, tmp_path / "parts")
    assert whole is not None
    assert parts is not None
    assert {**whole, "cpu_seconds": 0} == {**parts, "cpu_seconds": 0}
    models = [CASE.folder(tmp_path / name) / runs.MODEL for name in ("whole", "parts")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert not (CASE.folder(tmp_path / "parts") / runs.TRAINING).exists()


def test_a_finished_model_is_read_back_with_its_errors(tmp_path: Path) -> None:
    data = wave_data()
    result = run_case(CASE, data, tmp_path)
    assert result is not None
    model, mean, deviation = load_model(CASE.folder(tmp_path))
    splits = data.splits(6)
    errors = errors_of(model, splits.test)
    assert (errors.mse, errors.mae) == (result["mse"], result["mae"])
    assert torch.equal(mean, splits.mean)
    assert torch.equal(deviation, splits.deviation)
    with pytest.raises(ValueError, match="give the folder of a finished run"):
        load_model(tmp_path)


def test_finished_runs_are_read_back_and_all_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = wave_data()
    cases = cases_of(models=["dlinear", "attention", "dlinear"], horizons=[6, 3], seeds=[0])
    assert [(case.horizon, case.model) for case in cases] == [
        (6, "dlinear"), (6, "attention"), (3, "dlinear"), (3, "attention"),
    ]  # fmt: skip
    first = list(run_cases(cases, data, tmp_path))
    monkeypatch.setattr(runs, "Training", None)  # a training would fail
    assert list(run_cases(cases, data, tmp_path)) == first
    listed = read_json(tmp_path / "results.json")
    assert listed["runs"] == first
    assert listed["data"]["borders"] == [280, 40, 80]
    assert all(run["windows"] == data.splits(run["horizon"]).counts() for run in first)


def test_the_rate_with_the_best_validation_error_counts(tmp_path: Path) -> None:
    """Whatever was stopped in between; DLinear has its authors'."""
    data, rates = wave_data(), (1e-5, 3e-3)
    case, authors = cases_of(models=["attention", "dlinear"], horizons=[6], seeds=[0], rates=rates)
    assert (case.rates, authors.rates) == (rates, ())
    alone = [run_case(replace(case, rates=(rate,)), data, tmp_path / "alone") for rate in rates]
    assert run_case(case, data, tmp_path / "out", deadline=1.0, clock=Clock(5)) is None
    assert len(list(case.folder(tmp_path / "out").glob("training-*"))) == 2, "stopped within the second"
    result = run_case(case, data, tmp_path / "out")
    assert result is not None
    found = [each for each in alone if each is not None]
    assert result["rates"] == [[each["learning_rate"], each["validation_mse"]] for each in found]
    best = min(found, key=lambda each: each["validation_mse"])
    assert best["validation_mse"] < max(each["validation_mse"] for each in found)
    for key in ("learning_rate", "validation_mse", "mse", "mae", "best_epoch"):
        assert result[key] == best[key]
    assert sorted(path.name for path in case.folder(tmp_path / "out").iterdir()) == [runs.MODEL, runs.RESULT]
    assert len({each["identity"] for each in (*found, result)}) == 3


def test_a_model_that_is_built_otherwise_by_now_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_case(CASE, wave_data(), tmp_path)
    monkeypatch.setattr("trellis_dist.forecasting.models.MLP", 64)
    with pytest.raises(ValueError, match="holds a trellis of another size: train it again"):
        load_model(CASE.folder(tmp_path))


def test_the_time_ends_the_list_between_epochs(tmp_path: Path) -> None:
    cases = cases_of(models=["dlinear"], horizons=[6, 3], seeds=[0])
    results = list(run_cases(cases, wave_data(), tmp_path, deadline=1.0, clock=Clock(5)))
    assert len(results) == len(read_json(tmp_path / "results.json")["runs"]) == 1


def test_a_folder_of_other_data_or_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = wave_data()
    run_case(CASE, data, tmp_path / "done")
    run_case(CASE, data, tmp_path / "part", deadline=1.0, clock=Clock(2))
    other = replace(data, series=Series(data.series.names, data.series.values + 1), sha256="1" * 64)
    for name in ("done", "part"):
        with pytest.raises(ValueError, match="run of other data or settings: give another --out"):
            run_case(CASE, other, tmp_path / name)
    monkeypatch.setattr(runs, "settings_of", lambda *_, **__: {"another": "model"})
    with pytest.raises(ValueError, match="run of other data or settings"):
        run_case(CASE, data, tmp_path / "done")


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_state_is_refused_in_a_line(tmp_path: Path, kept: int) -> None:
    data = wave_data()
    run_case(CASE, data, tmp_path, deadline=1.0, clock=Clock(2))
    path = CASE.folder(tmp_path) / runs.TRAINING
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"is damaged .*: delete it to train this run anew"):
        run_case(CASE, data, tmp_path)


def test_nothing_is_trained_where_a_case_is_impossible(tmp_path: Path) -> None:
    for cases, message in (
        ([CASE, Case("trellis", 100, 0)], "too few for one window"),
        ([CASE, Case("none", 6, 0)], "no forecaster is called 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            next(run_cases(cases, wave_data(), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_slice_of_etth1_is_forecast_better_than_by_its_mean(tmp_path: Path) -> None:
    """The real file, its first half year; without it, waves of its shape."""
    lines = etth1(tmp_path).read_text().splitlines()[: 1 + 24 * 180]
    (tmp_path / "slice.csv").write_text("\n".join(lines) + "\n")
    data = open_data(tmp_path / "slice.csv", dataset="csv", look_back=96)
    result = run_case(Case("trellis", 24, 0), data, tmp_path / "out")
    assert result is not None
    mean = float(data.splits(24).test.rows[96:].square().mean())
    assert result["mse"] < 0.8 * mean
    assert result["windows"]["train"] == 3024 - 96 - 24 + 1
