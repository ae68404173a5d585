"""Runs in folders: one for each model, horizon and seed, saved after every epoch and gone on with.

OUT/h96/attention/seed-0/training.safetensors    while it trains: weights, best weights, moments, epochs
                                                 (one for each learning rate that is tried)
                         model.safetensors       then: the best weights and the scale of the data
                         forecast.csv            the steps after the end of the file, in its units
                         result.json             its errors and what decided them
OUT/results.json                                 the runs of the last command
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trellis_dist.files import REAL, make_directories, read_json, write_json
from trellis_dist.forecasting.cases import Case, Data, identity_of
from trellis_dist.forecasting.kept import load_tensors, save_model, save_tensors
from trellis_dist.forecasting.models import ForecastTraining, build, training_of
from trellis_dist.forecasting.training import Training, errors_of, usable_device

__all__ = ["RESULT", "TRAINING", "run_case", "run_cases"]

TRAINING, RESULT = "training.safetensors", "result.json"
Say = Callable[[str], None]


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
            _check_identity(folder, load_tensors(path)[1]["identity"], identity)


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
        tensors, record = load_tensors(state)
        _check_identity(state.parent, record["identity"], identity)
        training.load(tensors, record)
    while not training.finished:
        if deadline is not None and clock() >= deadline:
            return False
        start = time.process_time()
        training.epoch()
        training.seconds += time.process_time() - start
        save_tensors(state, training.tensors(), {**training.record(), "identity": identity})
        say(f"epoch {len(training.epochs)}: validation MSE {training.epochs[-1]:.4f}")
    return True


def _finish(
    case: Case, data: Data, trained: Sequence[Training], folder: Path, identity: str
) -> dict[str, Any]:
    """Score the best weights of the best rate and write what is kept; the states of training go last."""
    training = min(trained, key=lambda each: min(each.epochs))
    model, splits = training.take_best(), training.splits
    errors = errors_of(model, splits.test)
    save_model(folder, case.model, model, data, splits)
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


def _check_identity(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"{folder} holds a run of other data or settings: give another --out, or delete it")
