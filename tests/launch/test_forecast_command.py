"""`trellis forecast`: runs that are read back, a table, and refusals of one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from launch.cli import main
from tests.forecasting.series_files import waves, write_csv
from trellis_dist.files import read_json
from trellis_dist.forecasting import runs
from trellis_dist.forecasting.models import ForecastTraining


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = ForecastTraining(batch_size=16, windows=48, validation_every=4, epochs=2)
    monkeypatch.setattr(runs, "training_of", lambda *_, **__: settings)
    return write_csv(tmp_path / "waves.csv", waves(400, channels=2))


def command(series: Path, out: Path, **options: str) -> list[str]:
    given = {"horizons": "6,3", "models": "dlinear,attention", "look-back": "24", **options}
    pairs = [item for name, value in given.items() for item in (f"--{name}", value)]
    return ["forecast", "--data", str(series), "--out", str(out), *pairs]


def test_it_trains_what_is_asked_and_prints_a_table(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(series, tmp_path / "out", seeds="0,1")) == 0
    printed = capsys.readouterr().out
    found = read_json(tmp_path / "out" / "results.json")["runs"]
    assert len(found) == 8
    mean = sum(run["mse"] for run in found if (run["model"], run["horizon"]) == ("attention", 3)) / 2
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == "| model | 3 | 6 |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| dlinear", "| attention"]
    assert rows[3].split(" | ")[1].startswith(f"{mean:.3f} / ")
    assert printed.splitlines()[-1].startswith("learning rate 0.001, not chosen for each mixer: --rates")
    assert main(command(series, tmp_path / "out", seeds="0,1")) == 0
    assert capsys.readouterr().out == printed, "finished runs are read back"
    assert main(command(series, tmp_path / "out", models="attention", horizons="3", rates="1e-4,1e-3")) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("learning rates 0.00")


def test_time_that_is_up_says_how_to_go_on(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(series, tmp_path / "out", minutes="0")) == 75
    about = "400 rows of 2 channels (C0, C1): 280 training, 40 validation, 80 test\n"
    assert capsys.readouterr().out == f"{about}stopped with 0 of 4 runs finished; the same command goes on\n"


def test_a_step_is_said_and_what_is_given_of_the_training_is_done(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"models": "attention", "horizons": "3", "epochs": "1", "windows": "0"}
    assert main(command(series, tmp_path / "out", **one)) == 0
    (run,) = read_json(tmp_path / "out" / "results.json")["runs"]
    assert run["changed"] == {"epochs": 1, "windows": None}
    (error,) = run["validation_by_epoch"]
    said = f"attention, horizon 3, seed 0, rate 0.001, epoch 1: validation MSE {error:.4f}"
    assert capsys.readouterr().err.splitlines() == [said]
    assert (tmp_path / "out" / "h3" / "attention" / "seed-0-epochs-1-windows-all" / "forecast.csv").is_file()


def test_a_known_series_is_found_in_a_folder(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    series.rename(tmp_path / "folder" / "exchange_rate.txt")
    given = {"dataset": "exchange", "minutes": "0"}
    assert main(command(tmp_path / "folder", tmp_path / "out", **given)) == 1
    assert "exchange_rate.txt.gz: no such file" in capsys.readouterr().err
    packed = gzip.compress((tmp_path / "folder" / "exchange_rate.txt").read_bytes())
    (tmp_path / "folder" / "exchange_rate.txt.gz").write_bytes(packed)
    assert main(command(tmp_path / "folder", tmp_path / "out", **given)) == 75
    assert main(command(tmp_path / "folder", tmp_path / "out")) == 1
    assert "is a folder; give the path of a CSV file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options,message",
    [
        ({"models": "dlinear,attentoin"}, "no forecaster is called 'attentoin': use dlinear"),
        ({"models": ","}, "--models ',' names nothing"),
        ({"horizons": "6,x"}, "--horizons '6,x': give whole numbers from 1 on"),
        ({"horizons": "0"}, "--horizons '0': give whole numbers from 1 on"),
        ({"horizons": "4000"}, "too few for one window"),
        ({"rates": "1e-3,fast"}, "--rates '1e-3,fast': give learning rates, such as"),
        ({"rates": "1e-3,-1"}, "--rates '1e-3,-1': give learning rates between 0 and 1"),
        ({"device": "cuda"}, "--device cuda, but torch sees no CUDA device: use --device cpu"),
        ({"fractions": "0.5,0.5"}, "--fractions '0.5,0.5': give three shares"),
        ({"fractions": "0.5,0.2,0.2"}, "three positive shares that add up to 1"),
        ({"dataset": "etth1"}, "400 rows are fewer than the 14400 of etth1"),
        ({"dataset": "ettm2"}, "400 rows are fewer than the 57600 of ettm2"),
        ({"dataset": "etth1", "fractions": "0.6,0.2,0.2"}, "--fractions says nothing of etth1"),
        ({"look-back": "300"}, "280 training rows are fewer than look_back = 300"),
        ({"look-back": "8"}, "patch_length = 16 is longer than look_back = 8"),
        ({"data": "nowhere.csv"}, "nowhere.csv: no such file"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    series: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(command(series, tmp_path / "out", **options)) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()
