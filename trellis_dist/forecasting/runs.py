"""Runs in folders: one for each model, horizon and seed, saved after every epoch and gone on with.

OUT/h96/attention/seed-0/training.safetensors    while it trains: weights, best weights, moments, epochs
                                                 (one for each learning rate that is tried)
                         model.safetensors       then: the best weights and the scale of the data
                         forecast.csv            the steps after the end of the file, in its units
                         result.json             its errors and what decided them
OUT/results.json                                 the runs of the last command
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis_dist.files import (
    REAL,
    atomic_write,
    digest,
    make_directories,
    read_json,
    sha256_file,
    write_json,
)
from trellis_dist.forecasting.models import ForecastTraining, Shape, build, settings_of, training_of
from trellis_dist.forecasting.series import Series, read_series
from trellis_dist.forecasting.training import Training, errors_of, usable_device
from trellis_dist.forecasting.windows import Splits, borders_of, split

__all__ = [
    "FILES",
    "Case",
    "Data",
    "cases_of",
    "identity_of",
    "load_model",
    "open_data",
    "run_case",
    "run_cases",
]

TRAINING, MODEL, FORECAST, RESULT = "training.safetensors", "model.safetensors", "forecast.csv", "result.json"
# What the files of known series are called in a folder of them.
FILES = {
    "etth1": "ETTh1.csv",
    "etth2": "ETTh2.csv",
    "ettm1": "ETTm1.csv",
    "ettm2": "ETTm2.csv",
    "exchange": "exchange_rate.txt.gz",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        model: a name of ``models.build``.
        horizon: steps to forecast.
        seed: of weights, windows and dropout.
        rates: learning rates to try; the one with the best validation error counts. Empty: the model's own.
        changed: (name, value) of what else in ``ForecastTraining`` is not the model's own.
    """

    model: str
    horizon: int
    seed: int
    rates: tuple[float, ...] = ()
    changed: tuple[tuple[str, Any], ...] = ()

    def folder(self, out: Path) -> Path:
        """Where it lies under ``out``."""
        tried = "".join(f"-{rate:g}" for rate in self.rates)
        name = f"seed-{self.seed}" + (f"-rates{tried}" if tried else "")
        name += "".join(f"-{key}-{'all' if value is None else value}" for key, value in self.changed)
        return out / f"h{self.horizon}" / self.model / name

    def __str__(self) -> str:
        return f"{self.model}, horizon {self.horizon}, seed {self.seed}"


@dataclass(frozen=True)
class Data:
    """A series from a file, how it is split, and how far models look back.

    Attributes:
        dataset: a name of ``FILES``, or "csv".
        sha256: of the file.
        borders: rows of training, validation and test.
    """

    dataset: str
    sha256: str
    series: Series
    borders: tuple[int, int, int]
    look_back: int

    def splits(self, horizon: int) -> Splits:
        """Its windows. Raises ValueError where a part is too short for one."""
        return split(self.series, self.borders, look_back=self.look_back, horizon=horizon)

    def shape(self, horizon: int) -> Shape:
        """What a model has to fit."""
        return Shape(self.look_back, horizon, self.series.values.shape[1])

    def record(self) -> dict[str, Any]:
        """What decides the windows, as JSON takes it."""
        rows, channels = self.series.values.shape
        kept = {"dataset": self.dataset, "sha256": self.sha256, "look_back": self.look_back}
        return {**kept, "borders": list(self.borders), "rows": rows, "channels": channels}


def open_data(
    path: Path,
    *,
    dataset: str,
    look_back: int = 336,
    fractions: tuple[float, float, float] | None = None,
) -> Data:
    """The data in a file, or in the file of a known series in a folder, split as ``windows.borders_of`` says.

    Raises:
        ValueError: what ``read_series`` and ``borders_of`` raise.
    """
    if path.is_dir() and dataset in FILES:
        path = path / FILES[dataset]
    series = read_series(path)
    borders = borders_of(len(series.values), dataset=dataset, fractions=fractions)
    return Data(dataset, sha256_file(path), series, borders, look_back)


def cases_of(
    *,
    models: Sequence[str],
    horizons: Sequence[int],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    changed: Mapping[str, Any] | None = None,
    dataset: str = "csv",
) -> list[Case]:
    """Every combination once: all models of one horizon and seed before the next, so that they compare.

    On a known series DLinear keeps the rate of its authors, whatever ``rates`` the others try.
    """
    tried, other = tuple(dict.fromkeys(rates)), tuple(sorted((changed or {}).items()))
    found = [
        Case(model, horizon, seed, () if model == "dlinear" and dataset in FILES else tried, other)
        for seed, horizon, model in product(seeds, horizons, models)
    ]
    return list(dict.fromkeys(found))


def identity_of(case: Case, data: Mapping[str, Any], *, device: str = "cpu") -> str:
    """A digest of all that decides the result of a run; ``data``: what ``Data.record`` gives."""
    shape = Shape(data["look_back"], case.horizon, data["channels"])
    settings = settings_of(case.model, shape, dataset=data["dataset"])
    more: dict[str, Any] = {"rates": list(case.rates)} if case.rates else {}
    more |= {"changed": dict(case.changed)} if case.changed else {}
    more |= {"device": device} if device != "cpu" else {}
    return digest({"settings": settings, "seed": case.seed, "data": dict(data), **more})


def run_cases(
    cases: Sequence[Case],
    data: Data,
    out: Path,
    *,
    device: str = "cpu",
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Say = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """The result of each case in turn, until ``clock`` reads ``deadline``; finished ones are read back.

    Whatever finished is in OUT/results.json when a result is given. ``say`` takes a line for each epoch.

    Raises:
        ValueError: what ``run_case`` raises.
    """
    usable_device(device)
    for case in cases:  # refused before anything is trained
        data.splits(case.horizon)
        _check_folder(case.folder(out), identity_of(case, data.record(), device=device))
    results: list[dict[str, Any]] = []
    for case in cases:
        result = run_case(case, data, out, device=device, deadline=deadline, clock=clock, say=say)
        if result is None:
            return
        results.append(result)
        write_json(out / "results.json", {"data": data.record(), "runs": results})
        yield result


def run_case(
    case: Case,
    data: Data,
    out: Path,
    *,
    device: str = "cpu",
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Say = lambda line: None,
) -> dict[str, Any] | None:
    """Train a case from where its folder has it, score its test windows; None when ``clock`` ends it before.

    Raises:
        ValueError: the folder holds a run of other settings or data, or is damaged; every training diverged;
            no such device.
    """
    where = usable_device(device)
    folder, identity = case.folder(out), identity_of(case, data.record(), device=device)
    if (known := _known(folder, identity)) is not None:
        return known
    make_directories(folder)
    splits = data.splits(case.horizon).to(where)
    trained: list[Training] = []
    for settings in _candidates(case, data):
        model = build(case.model, data.shape(case.horizon), seed=case.seed).to(where)
        training = Training(model, splits, settings, case.seed)
        state, about = folder / _state_name(case, settings), f"{case}, rate {settings.learning_rate:g}"
        if not _train(training, state, identity, deadline, clock, _after(about, say)):
            return None
        trained.append(training)
    if all(min(each.epochs) == math.inf for each in trained):
        raise ValueError(f"{case}: the training diverged in its first epoch: give lower --rates")
    return _finish(case, data, trained, folder, identity)


def _after(about: str, say: Say) -> Say:
    """``say`` with what it is about before every line."""
    return lambda line: say(f"{about}, {line}")


def _known(folder: Path, identity: str) -> dict[str, Any] | None:
    """The result of a finished run; what a kill left of its training goes."""
    if not (folder / RESULT).is_file():
        return None
    result: dict[str, Any] = read_json(folder / RESULT)
    _check_identity(folder, result["identity"], identity)
    for path in folder.glob("training*.safetensors"):
        REAL.unlink(path)
    return result


def _check_folder(folder: Path, identity: str) -> None:
    """Raise ValueError where it holds another run, finished or not."""
    if _known(folder, identity) is None:
        for path in folder.glob("training*.safetensors"):
            _check_identity(folder, _load(path)[1]["identity"], identity)


def _candidates(case: Case, data: Data) -> list[ForecastTraining]:
    """The settings of each rate to try."""
    own = training_of(case.model, dataset=data.dataset, horizon=case.horizon)
    own = replace(own, **dict(case.changed))
    return [replace(own, learning_rate=rate) for rate in case.rates] or [own]


def _state_name(case: Case, settings: ForecastTraining) -> str:
    return f"training-{settings.learning_rate:g}.safetensors" if case.rates else TRAINING


def _train(
    training: Training,
    state: Path,
    identity: str,
    deadline: float | None,
    clock: Callable[[], float],
    say: Say,
) -> bool:
    """Epochs from where ``state`` has it, saved there after each; whether it finished before ``deadline``."""
    if state.is_file():
        tensors, record = _load(state)
        _check_identity(state.parent, record["identity"], identity)
        training.load(tensors, record)
    while not training.finished:
        if deadline is not None and clock() >= deadline:
            return False
        start = time.process_time()
        training.epoch()
        training.seconds += time.process_time() - start
        _save(state, training.tensors(), {**training.record(), "identity": identity})
        say(f"epoch {len(training.epochs)}: validation MSE {training.epochs[-1]:.4f}")
    return True


def _finish(
    case: Case, data: Data, trained: Sequence[Training], folder: Path, identity: str
) -> dict[str, Any]:
    """Score the best weights of the best rate and write what is kept; the states of training go last."""
    training = min(trained, key=lambda each: min(each.epochs))
    model, splits = training.take_best(), training.splits
    errors = errors_of(model, splits.test)
    scale = {"scale/mean": splits.mean, "scale/deviation": splits.deviation}
    weights = {f"model/{name}": value for name, value in model.state_dict().items()}
    shape = data.shape(case.horizon)
    built = {
        "name": case.model,
        "shape": [shape.look_back, shape.horizon, shape.channels],
        "built": _built(case.model, shape),
    }
    _save(folder / MODEL, {**weights, **scale}, {**built, "channels": list(data.series.names)})
    atomic_write(folder / FORECAST, _forecast(model, data, splits))
    result = {
        "model": case.model,
        "horizon": case.horizon,
        "seed": case.seed,
        "mse": errors.mse,
        "mae": errors.mae,
        "validation_mse": training.epochs[training.best_epoch],
        "learning_rate": training.settings.learning_rate,
        "rates": [_tried(each) for each in trained] if case.rates else [],
        "changed": dict(case.changed),
        "epochs": len(training.epochs),
        "validation_by_epoch": [_finite(error) for error in training.epochs],
        "best_epoch": training.best_epoch + 1,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": splits.test.rows.device.type,
        "cpu_seconds": round(sum(each.seconds for each in trained), 1),
        "windows": splits.counts(),
        "identity": identity,
    }
    write_json(folder / RESULT, result)
    for each in trained:
        REAL.unlink(folder / _state_name(case, each.settings))
    return result


def _tried(training: Training) -> list[float | None]:
    """Rate and best validation error."""
    return [training.settings.learning_rate, _finite(min(training.epochs))]


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if math.isfinite(error) else None


@torch.no_grad()
def _forecast(model: nn.Module, data: Data, splits: Splits) -> str:
    """CSV: a row for each step after the end of the series, a column for each channel, in its units."""
    device = splits.test.rows.device
    last = (data.series.values[-data.look_back :] - splits.mean) / splits.deviation  # [L, C]
    steps = model.eval()(last.float().to(device)[None])[0].double().cpu() * splits.deviation + splits.mean
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *data.series.names])
    writer.writerows([number, *map("{:.7g}".format, row)] for number, row in enumerate(steps.tolist(), 1))
    return text.getvalue()


def _built(name: str, shape: Shape) -> str:
    """A digest of how a model of this name is built; training's settings play no part."""
    return digest(settings_of(name, shape, dataset="csv")["model"])


def load_model(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A finished run's model, and the mean and deviation [C] of the data it was trained on.

    Forecasts of (x - mean) / deviation, times deviation plus mean, are in the units of the file.

    Raises:
        ValueError: no finished run, a damaged file, or a model that is built otherwise by now.
    """
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} holds no {MODEL}: give the folder of a finished run")
    tensors, record = _load(folder / MODEL)
    shape = Shape(*record["shape"])
    if record.get("built") != _built(record["name"], shape):
        raise ValueError(f"{folder} holds a {record['name']} that is built otherwise by now: train it again")
    model = build(record["name"], shape, seed=0)
    weights = {name: value for name, value in tensors.items() if name.startswith("model/")}
    model.load_state_dict({name.removeprefix("model/"): value for name, value in weights.items()})
    return model.eval(), tensors["scale/mean"], tensors["scale/deviation"]


def _check_identity(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"{folder} holds a run of other data or settings: give another --out, or delete it")


def _save(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    from safetensors.torch import save

    whole = {name: value.contiguous() for name, value in tensors.items()}
    atomic_write(path, save(whole, metadata={"record": json.dumps(record, sort_keys=True)}))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return tensors, json.loads(file.metadata()["record"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to train this run anew") from error
