"""Runs in folders: one for each model, horizon and seed, saved after every epoch and gone on with.

OUT/h96/attention/seed-0/training.safetensors    while it trains: weights, best weights, moments, epochs
                         model.safetensors       then: the best weights and the scale of the data
                         result.json             its errors and what decided them
OUT/results.json                                 the runs of the last command
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

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
from trellis_dist.forecasting.models import Shape, build, settings_of, training_of
from trellis_dist.forecasting.series import Series, read_series
from trellis_dist.forecasting.training import Training, errors_of
from trellis_dist.forecasting.windows import FRACTIONS, Splits, borders_of, split

__all__ = ["Case", "Data", "cases_of", "identity_of", "load_model", "open_data", "run_case", "run_cases"]

TRAINING, MODEL, RESULT = "training.safetensors", "model.safetensors", "result.json"


@dataclass(frozen=True)
class Case:
    """One run: a name of ``models.build``, steps to forecast, and a seed."""

    model: str
    horizon: int
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it lies under ``out``."""
        return out / f"h{self.horizon}" / self.model / f"seed-{self.seed}"


@dataclass(frozen=True)
class Data:
    """A series from a file, how it is split, and how far models look back.

    Attributes:
        dataset: "etth1", "exchange" or "csv".
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
    fractions: tuple[float, float, float] = FRACTIONS,
) -> Data:
    """The data in a file, split as ``windows.borders_of`` says.

    Raises:
        ValueError: what ``read_series`` and ``borders_of`` raise.
    """
    series = read_series(path)
    borders = borders_of(len(series.values), dataset=dataset, fractions=fractions)
    return Data(dataset, sha256_file(path), series, borders, look_back)


def cases_of(*, models: Sequence[str], horizons: Sequence[int], seeds: Sequence[int]) -> list[Case]:
    """Every combination once: all models of one horizon and seed before the next, so that they compare."""
    found = [Case(model, horizon, seed) for seed, horizon, model in product(seeds, horizons, models)]
    return list(dict.fromkeys(found))


def identity_of(case: Case, data: Data) -> str:
    """A digest of all that decides the result of a run."""
    settings = settings_of(case.model, data.shape(case.horizon), dataset=data.dataset)
    return digest({"settings": settings, "seed": case.seed, "data": data.record()})


def run_cases(
    cases: Sequence[Case],
    data: Data,
    out: Path,
    *,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """The result of each case in turn, until ``clock`` reads ``deadline``; finished ones are read back.

    Whatever finished is in OUT/results.json when a result is given.

    Raises:
        ValueError: what ``run_case`` raises.
    """
    for case in cases:  # refused before anything is trained
        data.splits(case.horizon)
        settings_of(case.model, data.shape(case.horizon), dataset=data.dataset)
    results: list[dict[str, Any]] = []
    for case in cases:
        result = run_case(case, data, out, deadline=deadline, clock=clock)
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
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any] | None:
    """Train a case from where its folder has it, score its test windows; None when ``clock`` ends it before.

    Raises:
        ValueError: the folder holds a run of other settings or data, or is damaged; a training diverged.
    """
    folder, identity = case.folder(out), identity_of(case, data)
    if (folder / RESULT).is_file():
        result: dict[str, Any] = read_json(folder / RESULT)
        _check_identity(folder, result["identity"], identity)
        return result
    make_directories(folder)
    splits = data.splits(case.horizon)
    model = build(case.model, data.shape(case.horizon), seed=case.seed)
    settings = training_of(case.model, dataset=data.dataset, horizon=case.horizon)
    training = Training(model, splits, settings, case.seed)
    if (folder / TRAINING).is_file():
        tensors, record = _load(folder / TRAINING)
        _check_identity(folder, record["identity"], identity)
        training.load(tensors, record)
    while not training.finished:
        if deadline is not None and clock() >= deadline:
            return None
        start = time.process_time()
        training.epoch()
        training.seconds += time.process_time() - start
        _save(folder / TRAINING, training.tensors(), {**training.record(), "identity": identity})
    return _finish(case, data, training, folder, identity)


def _finish(case: Case, data: Data, training: Training, folder: Path, identity: str) -> dict[str, Any]:
    """Score the best weights and write what is kept; the state of training goes last."""
    model, splits = training.take_best(), training.splits
    errors = errors_of(model, splits.test)
    scale = {"scale/mean": splits.mean, "scale/deviation": splits.deviation}
    weights = {f"model/{name}": value for name, value in model.state_dict().items()}
    shape = data.shape(case.horizon)
    built = {"name": case.model, "shape": [shape.look_back, shape.horizon, shape.channels]}
    _save(folder / MODEL, {**weights, **scale}, {**built, "channels": list(data.series.names)})
    result = {
        "model": case.model,
        "horizon": case.horizon,
        "seed": case.seed,
        "mse": errors.mse,
        "mae": errors.mae,
        "validation_mse": training.epochs[training.best_epoch],
        "epochs": len(training.epochs),
        "best_epoch": training.best_epoch + 1,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": round(training.seconds, 1),
        "windows": splits.counts(),
        "identity": identity,
    }
    write_json(folder / RESULT, result)
    REAL.unlink(folder / TRAINING)
    return result


def load_model(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A finished run's model, and the mean and deviation [C] of the data it was trained on.

    Forecasts of (x - mean) / deviation, times deviation plus mean, are in the units of the file.

    Raises:
        ValueError: no finished run, or a damaged file.
    """
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} holds no {MODEL}: give the folder of a finished run")
    tensors, record = _load(folder / MODEL)
    model = build(record["name"], Shape(*record["shape"]), seed=0)
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
