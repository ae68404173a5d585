"""The forecasting benchmark: what it keeps, what it makes anew, and the page's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import forecast
from tests.forecasting.series_files import waves, write_csv
from trellis_dist.files import read_json, write_json
from trellis_dist.forecasting import runs
from trellis_dist.forecasting.cases import identity_of
from trellis_dist.forecasting.models import ForecastTraining
from trellis_dist.forecasting.windows import BORDERS

PAGE = "# Page\n<!-- forecast tables -->\nold\n<!-- end -->\nrest\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small series under the real names, quick trainings, horizons of 6 and 3."""
    settings = ForecastTraining(batch_size=16, windows=32, validation_every=8, epochs=1)
    monkeypatch.setattr(runs, "training_of", lambda *_, **__: settings)
    monkeypatch.setattr(forecast, "HORIZONS", (3, 6))
    monkeypatch.setattr(
        forecast, "PUBLISHED", {name: {3: (0.1, 0.2), 6: (0.3, 0.4)} for name in forecast.FILES}
    )
    monkeypatch.setattr(forecast, "FILES", {name: f"{name}.csv" for name in forecast.FILES})
    monkeypatch.setitem(BORDERS, "etth1", (500, 400, 400))
    for name in forecast.FILES:
        write_csv(tmp_path / f"{name}.csv", waves(3400 if name == "exchange" else 1400, channels=2))
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def measure(folder: Path, *more: str, model: str = "dlinear") -> dict[str, Any]:
    places = {
        "data": folder,
        "work": folder / "work",
        "output": folder / "out.json",
        "page": folder / "page.md",
    }
    pairs = [item for name, path in places.items() for item in (f"--{name}", str(path))]
    status = forecast.main([*pairs, "--models", model, *more])
    assert status == (75 if "--minutes" in more else 0)
    found: dict[str, Any] = read_json(folder / "out.json")
    return found


def test_results_grow_are_kept_and_reach_the_page(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(small, "--datasets", "etth1", "--horizons", "3")
    assert [(run["dataset"], run["horizon"]) for run in first["runs"]] == [("etth1", 3)]
    assert {"machine", "versions", "models", "data"} <= first.keys()
    assert first["runs"][0]["training"]["epochs"] > 0
    (small / "work").rename(small / "gone")  # the JSON alone is enough to go on from
    both = measure(small)
    assert len(both["runs"]) == 4
    assert first["runs"][0] in both["runs"]
    assert set(both["data"]) == set(forecast.FILES)
    assert not (small / "work" / "etth1" / "h3").exists()
    monkeypatch.setattr(runs, "Training", None)  # a training would fail
    assert measure(small, "--datasets", "exchange") == both
    page = (small / "page.md").read_text()
    assert page == f"# Page\n<!-- forecast tables -->\n{forecast.render(both)}\n<!-- end -->\nrest\n"
    run = next(r for r in both["runs"] if (r["dataset"], r["horizon"]) == ("exchange", 6))
    assert f"{run['mse']:.3f} / {run['mae']:.3f}" in page.split("| exchange")[1]


def test_a_run_of_other_settings_is_made_again(small: Path) -> None:
    report = measure(small, "--datasets", "etth1", "--horizons", "3")
    write_json(
        small / "out.json", {**report, "runs": [{**report["runs"][0], "identity": "0" * 64, "mse": 9.0}]}
    )
    (small / "work").rename(small / "gone")
    assert measure(small, "--minutes", "0")["runs"] == [], "nor is it shown until then"
    again = measure(small, "--datasets", "etth1", "--horizons", "3")
    assert again["runs"] == report["runs"]


def test_a_chosen_rate_takes_the_place_of_a_given_one(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ("--datasets", "etth1", "--horizons", "3")
    given = measure(small, *cell, model="attention")
    assert "| 0.001, chosen with it |" in forecast.render(given)
    others = {**given, "runs": [{**given["runs"][0], "model": "trellis"}]}
    assert "| 0.001, attention's |" in forecast.render(others), "it was not chosen for Trellis"
    chosen = measure(small, *cell, "--rates", "1e-3", "3e-3", model="attention")
    (run,) = chosen["runs"]
    assert f"| {run['learning_rate']:g}, best of 2 on validation |" in forecast.render(chosen)
    monkeypatch.setattr(runs, "Training", None)  # a training would fail
    assert measure(small, *cell, model="attention") == chosen


def test_a_gpu_that_is_not_there_is_one_line(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        measure(small, "--device", "cuda")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--device cuda, but torch sees no CUDA device: use --device cpu")


@pytest.mark.parametrize(
    "more,message",
    [
        (("--models", "attentoin"), "no forecaster is called 'attentoin'"),
        (("--rates", "-1"), "give learning rates between 0 and 1"),
        (("--data", "nowhere"), "no such file"),
        (("--data", "another"), "is another file than"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_loses_nothing(
    small: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, str],
    message: str,
) -> None:
    measure(small, "--datasets", "etth1", "--horizons", "3")
    before = (small / "out.json").read_bytes()
    monkeypatch.chdir(small)
    (small / "another").mkdir()
    write_csv(small / "another" / "etth1.csv", 1 + waves(1400, channels=2))
    with pytest.raises(SystemExit):
        measure(small, "--datasets", "etth1", *more)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (small / "out.json").read_bytes() == before


def test_a_row_says_how_each_of_its_rates_was_found() -> None:
    training = {"learning_rate": 1e-3}
    chosen = {"training": {"learning_rate": 5e-4}, "rates": [[5e-4, 0.1], [1e-3, 0.2]]}
    given = {"training": training, "rates": [[1e-3, 0.1]]}
    assert forecast._rate("attention", [given]) == "0.001, given"
    assert forecast._rate("trellis", [chosen, {"training": training}]) == (
        "0.001, attention's; 0.0005, best of 2 on validation"
    )


def test_the_committed_runs_are_of_todays_models_and_settings() -> None:
    report = read_json(forecast.RESULT)
    for run in report["runs"]:
        data = report["data"][run["dataset"]]
        assert run["identity"] == identity_of(forecast._case(run), data, device=run.get("device", "cpu")), run
    assert set(report["models"]) == {run["model"] for run in report["runs"]}


def test_time_that_is_up_leaves_what_is_there(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measure(small, "--datasets", "etth1", "--horizons", "3")
    assert measure(small, "--minutes", "0") == report
    assert "time is up; the same command goes on" in capsys.readouterr().out


def test_a_cell_of_several_seeds_has_their_mean_and_spread() -> None:
    found = forecast._cell([{"mse": 0.30, "mae": 0.4}, {"mse": 0.34, "mae": 0.5}])
    assert found == "0.320 / 0.450 (2 seeds, 0.020)"


def test_the_page_has_the_numbers_of_the_result() -> None:
    text = forecast.PAGE.read_text(encoding="utf-8")
    assert forecast.render(read_json(forecast.RESULT)) in text


def test_the_baseline_reproduces_what_was_published() -> None:
    """DLinear's MSE within 3% on ETTh1; on Exchange docs/forecasting.md says why it scatters."""
    found = [run for run in read_json(forecast.RESULT)["runs"] if run["model"] == "dlinear"]
    for dataset, most in (("etth1", 0.03), ("exchange", 0.25)):
        for horizon, (mse, _) in forecast.PUBLISHED[dataset].items():
            case = (dataset, horizon)
            ours = [run["mse"] for run in found if (run["dataset"], run["horizon"]) == case]
            assert sum(ours) / len(ours) == pytest.approx(mse, rel=most), case
