"""Runs in folders: resumed to the same bits, read back, refused where they are others; the real ETTh1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.forecasting.series_files import etth1, wave_data
from trellis_dist.files import read_json
from trellis_dist.forecasting import kept, runs
from trellis_dist.forecasting.cases import Case, cases_of, identity_of, open_data
from trellis_dist.forecasting.kept import load_model
from trellis_dist.forecasting.models import ForecastTraining
from trellis_dist.forecasting.runs import run_case, run_cases
from trellis_dist.forecasting.series import Series
from trellis_dist.forecasting.training import Errors, errors_of

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
    models = [CASE.folder(tmp_path / name) / kept.MODEL for name in ("whole", "parts")]
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
    both = {"models": ["attention", "dlinear"], "horizons": [6], "seeds": [0], "rates": rates}
    case, authors = cases_of(**both, dataset="etth1")
    assert (case.rates, authors.rates) == (rates, ())
    assert {each.rates for each in cases_of(**both)} == {rates}, (
        "of other series nobody has given DLinear one"
    )
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
    assert sorted(path.name for path in case.folder(tmp_path / "out").iterdir()) == [
        kept.FORECAST,
        kept.MODEL,
        runs.RESULT,
    ]
    assert len({each["identity"] for each in (*found, result)}) == 3


def test_a_model_that_is_built_otherwise_by_now_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every weight still has its shape."""
    run_case(CASE, wave_data(), tmp_path)
    for name, value in (("MLP", 64), ("CHUNK", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"trellis_dist.forecasting.models.{name}", value)
            with pytest.raises(ValueError, match="a trellis that is built otherwise by now: train it again"):
                load_model(CASE.folder(tmp_path))
    load_model(CASE.folder(tmp_path))


def test_validation_alone_chooses_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test windows would choose the other one."""
    data, validation = wave_data(), {1e-4: 1.0, 2e-4: 2.0}
    tests = iter([9.0])

    def epoch(self: runs.Training) -> None:
        self.epochs.append(validation[self.settings.learning_rate])

    monkeypatch.setattr(runs.Training, "epoch", epoch)
    monkeypatch.setattr(runs.Training, "tensors", lambda self: {})
    monkeypatch.setattr(runs, "errors_of", lambda model, windows: Errors(next(tests), 9.0))
    result = run_case(Case("dlinear", 6, 0, (2e-4, 1e-4)), data, tmp_path)
    assert result is not None
    assert (result["learning_rate"], result["mse"]) == (1e-4, 9.0)
    assert next(tests, None) is None, "the test windows are scored once"


def test_a_rate_that_diverges_loses_and_alone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ForecastTraining(batch_size=16, windows=48, clip_norm=None, epochs=2)
    monkeypatch.setattr(runs, "training_of", lambda *_, **__: settings)
    case, data = Case("dlinear", 6, 0, (1e30, 1e-3)), wave_data()
    result = run_case(case, data, tmp_path)
    assert result is not None
    assert (result["learning_rate"], result["rates"][0]) == (1e-3, [1e30, None])
    assert len(result["validation_by_epoch"]) == 2
    for _ in range(2):  # of what was saved too
        with pytest.raises(
            ValueError, match="dlinear, horizon 6, seed 0: the training diverged in its first"
        ):
            run_case(replace(case, rates=(1e30,)), data, tmp_path)


def test_the_forecast_follows_the_end_of_the_file_in_its_units(tmp_path: Path) -> None:
    data = wave_data()
    data = replace(data, series=Series(("a", "b"), 100 + 7 * data.series.values))
    run_case(CASE, data, tmp_path)
    lines = (CASE.folder(tmp_path) / kept.FORECAST).read_text().splitlines()
    assert lines[0] == "step,a,b"
    found = torch.tensor([[float(field) for field in line.split(",")] for line in lines[1:]])
    assert found[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    model, mean, deviation = load_model(CASE.folder(tmp_path))
    read = ((data.series.values[-24:] - mean) / deviation).float()
    with torch.no_grad():
        expected = model(read[None])[0] * deviation + mean
    torch.testing.assert_close(found[:, 1:].double(), expected, rtol=1e-5, atol=0)
    assert 80 < float(found[:, 1:].min()) < float(found[:, 1:].max()) < 120


def test_a_run_on_another_device_or_of_given_settings_is_another_run() -> None:
    data = wave_data().record()
    identities = [
        identity_of(CASE, data),
        identity_of(CASE, data, device="cuda"),
        identity_of(replace(CASE, changed=(("epochs", 2),)), data),
        identity_of(replace(CASE, rates=(1e-3,)), data),
    ]
    assert len(set(identities)) == 4


def test_a_folder_of_another_run_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = wave_data()
    run_case(replace(CASE, horizon=3), data, tmp_path)
    other = replace(data, sha256="1" * 64)
    with pytest.raises(ValueError, match="run of other data or settings"):
        next(run_cases([CASE, replace(CASE, horizon=3)], other, tmp_path))
    assert not CASE.folder(tmp_path).exists()


def test_what_a_kill_left_behind_a_result_goes(tmp_path: Path) -> None:
    result = run_case(CASE, wave_data(), tmp_path)
    left = CASE.folder(tmp_path) / "training-0.001.safetensors"
    left.write_bytes(b"left")
    assert run_case(CASE, wave_data(), tmp_path) == result
    assert not left.exists()


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
    monkeypatch.setattr("trellis_dist.forecasting.cases.settings_of", lambda *_, **__: {"another": "model"})
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
