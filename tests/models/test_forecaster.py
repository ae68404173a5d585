"""The patch forecaster: normalisation that inverts, patches, shapes, causality, gradients, declared kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.conftest import tiny_config
from trellis_dist.models.forecaster import Forecaster, RevIN, build_forecaster, patches_of
from trellis_dist.models.forecaster_config import ForecasterConfig
from trellis_dist.models.parallel_kind import undeclared
from trellis_dist.models.registry import MIXERS

WINDOW = {"look_back": 20, "horizon": 5, "channels": 3, "patch_length": 6, "stride": 4}


def forecaster(kind: str = "trellis", **overrides: Any) -> Forecaster:
    body = tiny_config(pattern=(kind,))
    config = ForecasterConfig(**{**WINDOW, "dropout": 0.0, "body": body, **overrides})
    return build_forecaster(config, seed=0, dtype=torch.float64)


def windows(count: int = 2, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, 3, generator=generator, dtype=torch.float64).cumsum(1)


def moved_revin() -> RevIN:
    """One whose affine map is not the identity."""
    layer = RevIN(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -2.0, 3.0]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, -4.0]))
    return layer


def test_the_normalisation_inverts() -> None:
    x, layer = 1e3 + 50 * windows(), moved_revin()
    normal, level = layer.normalise(x)
    torch.testing.assert_close(layer.restore(normal, level), x, rtol=1e-13, atol=1e-10)


def test_the_normalisation_is_of_each_window_and_channel() -> None:
    x, layer = windows(), moved_revin()
    normal, _ = layer.normalise(x)
    for row in range(2):
        for channel in range(3):
            values = x[row, :, channel]
            mean = sum(values.tolist()) / 20
            variance = sum((value - mean) ** 2 for value in values.tolist()) / 20
            expected = (values - mean) / (variance + 1e-5) ** 0.5 * layer.weight[channel] + layer.bias[
                channel
            ]
            torch.testing.assert_close(normal[row, :, channel], expected, rtol=1e-12, atol=1e-12)


def test_a_constant_series_is_forecast_at_its_level() -> None:
    y = forecaster()(torch.full((1, 20, 3), 7.0, dtype=torch.float64))
    assert torch.isfinite(y).all()
    assert (y - 7.0).abs().max() < 0.1


def test_forecasts_follow_level_and_scale() -> None:
    model, x = forecaster(), windows()
    torch.testing.assert_close(model(100 * x + 7), 100 * model(x) + 7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length,stride", [(6, 4), (6, 6), (5, 1), (20, 20), (16, 8)])
def test_patches_are_those_of_a_loop(length: int, stride: int) -> None:
    rows = windows()[..., 0]
    padded = [[*row, *[row[-1]] * stride] for row in rows.tolist()]
    starts = range(0, 20 + stride - length + 1, stride)
    expected = [[row[start : start + length] for start in starts] for row in padded]
    found = patches_of(rows, length=length, stride=stride)
    assert found.tolist() == expected
    config = replace(forecaster().config, patch_length=length, stride=stride)
    assert config.patches == len(expected[0])


def test_patchtst_has_42_patches_of_336_steps() -> None:
    config = replace(forecaster().config, look_back=336, patch_length=16, stride=8)
    assert config.patches == 42


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_every_mixer_forecasts_and_every_weight_gets_a_gradient(kind: str) -> None:
    model = forecaster(kind)
    y = model(windows())
    assert y.shape == (2, 5, 3)
    y.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert undeclared(model) == []


def test_the_gradient_is_that_of_differences() -> None:
    model = forecaster()
    x = windows(1)
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sin().sum(), x)
    step = torch.zeros_like(x)
    for place in ((0, 3, 1), (0, 19, 0)):
        step.zero_()[place] = 1e-6
        with torch.no_grad():
            slope = (model(x + step).sin().sum() - model(x - step).sin().sum()) / 2e-6
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_a_patch_sees_no_later_patch(kind: str) -> None:
    model, patches = forecaster(kind), windows(4).transpose(1, 2).reshape(-1, 20).unfold(-1, 6, 4)
    changed = patches.clone()
    changed[:, 2:] += 1
    before, after = (model._body(x) for x in (patches, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2], rtol=1e-12, atol=1e-12)
    assert (before[:, 2:] - after[:, 2:]).abs().amin((0, 2)).max() > 0


def test_channels_do_not_see_each_other() -> None:
    model, x = forecaster(), windows()
    other = x.clone()
    other[..., 1] = windows(seed=1)[..., 1]
    torch.testing.assert_close(model(x)[..., [0, 2]], model(other)[..., [0, 2]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x)[..., 1], model(other)[..., 1])


def test_dropout_is_for_training_alone() -> None:
    model, x = forecaster(dropout=0.5), windows()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("shape", [(2, 19, 3), (2, 20, 4), (20, 3)])
def test_a_window_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass \[windows, 20, 3\]"):
        forecaster()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"patch_length": 21}, "longer than look_back = 20"),
        ({"stride": 7}, "unread"),
        ({"horizon": 0}, "horizon = 0: use 1 or more"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecaster(**wrong)
