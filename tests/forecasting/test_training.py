"""Training: errors against a loop, a wave that is learned, early stopping, bits that resume."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.forecasting.series_files import wave_data
from trellis_dist.forecasting.models import ForecastTraining, Shape, build, known_models, training_of
from trellis_dist.forecasting.training import Errors, Training, errors_of, usable_device
from trellis_dist.forecasting.windows import Windows

QUICK = ForecastTraining(batch_size=16, windows=64, validation_every=3, epochs=3, patience=2)


class Repeat(nn.Module):
    """Forecasts the last value it read."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:].expand(-1, self.horizon, -1)


def training(
    name: str = "trellis", settings: ForecastTraining = QUICK, *, seed: int = 0, device: str = "cpu"
) -> Training:
    data, where = wave_data(), torch.device(device)
    model = build(name, data.shape(6), seed=seed).to(where)
    return Training(model, data.splits(6).to(where), settings, seed)


@pytest.mark.parametrize("rows,every", [(20, 1), (150, 1), (150, 4)])
def test_errors_are_those_of_a_loop_over_windows(rows: int, every: int) -> None:
    values = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    windows = Windows(values, 5, 3)
    squared, absolute = [], []
    for start in range(0, rows - 8 + 1, every):
        for step in range(3):
            for channel in range(2):
                last = float(values[start + 4, channel])
                difference = last - float(values[start + 5 + step, channel])
                squared.append(difference**2)
                absolute.append(abs(difference))
    errors = errors_of(Repeat(3), windows, every=every)
    assert errors.mse == pytest.approx(statistics.fmean(squared), rel=1e-5)
    assert errors.mae == pytest.approx(statistics.fmean(absolute), rel=1e-5)


@pytest.mark.parametrize("name", ["dlinear", "attention", "trellis", "trellis-corrected"])
def test_a_wave_is_learned_far_better_than_its_mean(name: str) -> None:
    settings = replace(QUICK, windows=256, epochs=8, patience=8, decay=1.0, learning_rate=3e-3)
    run = training(name, settings)
    mean = float(run.splits.test.rows[24:].square().mean())
    noise = 0.01 / 0.51  # of the wave's variance of 0.5, and its own
    while not run.finished:
        run.epoch()
    found = errors_of(run.take_best(), run.splits.test).mse
    assert found < 0.15 * mean
    assert found > 0.5 * noise, "better than the noise allows: the future was read"


def test_the_best_epoch_is_kept_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    target = "trellis_dist.forecasting.training.errors_of"
    monkeypatch.setattr(target, lambda *_, **__: Errors(next(scripted), 0.0))
    run, weights = training("dlinear", replace(QUICK, epochs=9, patience=2)), []
    while not run.finished:
        run.epoch()
        weights.append(run.model.trend_weight.detach().clone())
    assert run.epochs == [3.0, 2.0, 2.5, 2.0], "two epochs without a better one"
    assert run.best_epoch == 1
    assert torch.equal(run.take_best().trend_weight, weights[1])
    assert not torch.equal(weights[1], weights[3])


def test_epochs_end_it_and_the_rate_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    run, rates = training("dlinear", replace(QUICK, epochs=4, patience=9, learning_rate=0.8)), []
    monkeypatch.setattr(run, "_step", lambda *_: rates.append(run._optimizer.param_groups[0]["lr"]))
    while not run.finished:
        run.epoch()
    assert rates == [0.8] * 8 + [0.4] * 4 + [0.2] * 4


def test_a_training_that_diverges_ends_with_its_best_epoch() -> None:
    run = training("dlinear", replace(QUICK, learning_rate=1e30, clip_norm=None))
    run.epoch()
    assert (run.epochs, run.diverged, run.finished) == ([math.inf], True, True)
    late = training("dlinear", replace(QUICK, epochs=9, patience=9))
    late.epoch()
    kept = late.model.trend_weight.detach().clone()
    late.settings = replace(late.settings, learning_rate=1e30, clip_norm=None)
    late.epoch()
    assert (late.finished, late.best_epoch) == (True, 0)
    assert torch.equal(late.take_best().trend_weight, kept)


def test_an_epoch_is_judged_by_validation_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[Windows, int]] = []

    def errors(model: nn.Module, windows: Windows, *, every: int = 1) -> Errors:
        judged.append((windows, every))
        return Errors(1.0, 1.0)

    monkeypatch.setattr("trellis_dist.forecasting.training.errors_of", errors)
    run, read = training("dlinear"), []
    original = Windows.batch
    monkeypatch.setattr(Windows, "batch", lambda self, indices: read.append(self) or original(self, indices))
    run.epoch()
    assert [(windows is run.splits.validation, every) for windows, every in judged] == [(True, 3)]
    assert read
    assert all(windows is run.splits.train for windows in read)


def test_dlinear_is_trained_as_its_authors_scripts_do_on_each_problem() -> None:
    """(batch size, rate) of cure-lab/LTSF-Linear, scripts/EXP-LongForecasting/DLinear."""
    expected = {
        ("etth1", 96): (8, 1e-4),
        ("etth1", 720): (8, 1e-4),
        ("exchange", 96): (8, 5e-4),
        ("exchange", 192): (8, 5e-4),
        ("exchange", 336): (32, 5e-4),
        ("exchange", 720): (32, 5e-3),
    }
    for (dataset, horizon), wanted in expected.items():
        found = training_of("dlinear", dataset=dataset, horizon=horizon)
        assert (found.batch_size, found.learning_rate) == wanted
        assert (found.windows, found.epochs, found.validation_every) == (None, 10, 1)
        assert training_of("attention", dataset=dataset, horizon=horizon) == ForecastTraining()


def states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["dlinear", "trellis"])
def test_going_on_gives_the_bits_of_never_stopping(name: str) -> None:
    whole, before, after = (training(name) for _ in range(3))
    for _ in range(3):
        whole.epoch()
    before.epoch()
    tensors, record = before.tensors(), before.record()
    before.epoch()  # what was taken does not change with what goes on
    torch.manual_seed(99)  # nor does the process's own stream matter
    after.load(tensors, record)
    after.epoch()
    after.epoch()
    assert after.epochs == whole.epochs
    assert states_equal(after.tensors(), whole.tensors())


def test_seeds_differ_and_the_process_stream_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = training(seed=0), training(seed=1)
    first.epoch()
    second.epoch()
    assert torch.equal(torch.rand(1), expected)
    assert first.epochs != second.epochs


def drawn(settings: ForecastTraining, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The windows of each batch of two epochs."""
    found: list[list[int]] = []
    original = Windows.batch

    def batch(self: Windows, indices: Tensor) -> Any:
        found.append(indices.tolist())
        return original(self, indices)

    run = training("dlinear", settings)
    monkeypatch.setattr(Windows, "batch", batch)
    monkeypatch.setattr("trellis_dist.forecasting.training.errors_of", lambda *_, **__: Errors(1.0, 1.0))
    run.epoch()
    run.epoch()
    return found


def test_an_epoch_draws_windows_once_in_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 280 - 24 - 6 + 1
    batches = drawn(replace(QUICK, windows=None), monkeypatch)
    epochs = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    for epoch in epochs:
        flat = [index for batch in epoch for index in batch]
        assert len(set(flat)) == len(flat) == count // 16 * 16
        assert set(flat) <= set(range(count))
    assert epochs[0] != epochs[1]


def test_fewer_windows_are_drawn_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = drawn(replace(QUICK, windows=40), monkeypatch)
    assert [len(batch) for batch in batches] == [16, 16] * 2
    lone = drawn(replace(QUICK, windows=10), monkeypatch)
    assert [len(batch) for batch in lone] == [10, 10], "an only batch may be incomplete"


@pytest.mark.parametrize("shape", [Shape(336, 96, 7), Shape(336, 720, 8), Shape(24, 6, 2)])
def test_every_mixer_has_as_many_parameters_as_trellis(shape: Shape) -> None:
    counts = {}
    for name in set(known_models()) - {"dlinear"}:
        counts[name] = sum(each.numel() for each in build(name, shape, seed=0).parameters())
    wanted = counts["trellis"]
    assert max(abs(count - wanted) for count in counts.values()) <= 0.02 * wanted, counts


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda, but torch sees no CUDA device: use --device cpu"):
        usable_device("cuda")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no forecaster is called 'atention': use dlinear, trellis"):
        build("atention", Shape(24, 6, 2), seed=0)
