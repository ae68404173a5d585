"""DLinear against its formula, written out step by step."""

from __future__ import annotations

import pytest
import torch

from trellis_dist.models.dlinear import build_dlinear
from trellis_dist.models.forecaster_config import DLinearConfig
from trellis_dist.models.parallel_kind import undeclared


def test_it_is_the_formula() -> None:
    model = build_dlinear(DLinearConfig(look_back=12, horizon=4, window=5), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    found = model(x)
    for row in range(2):
        for channel in range(3):
            series = x[row, :, channel].tolist()
            ends = [series[0]] * 2 + series + [series[-1]] * 2
            trend = torch.tensor([sum(ends[i : i + 5]) / 5 for i in range(12)], dtype=torch.float64)
            rest = torch.tensor(series, dtype=torch.float64) - trend
            expected = model.seasonal_weight @ rest + model.seasonal_bias
            expected = expected + model.trend_weight @ trend + model.trend_bias
            torch.testing.assert_close(found[row, :, channel], expected, rtol=1e-12, atol=1e-12)


def test_it_begins_with_the_average_of_what_it_read() -> None:
    model = build_dlinear(DLinearConfig(look_back=30, horizon=4), seed=0, dtype=torch.float64)
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(model(x), x.mean(1, keepdim=True).expand(2, 4, 3))
    assert undeclared(model) == []


def test_wrong_windows_and_settings_are_refused() -> None:
    model = build_dlinear(DLinearConfig(look_back=12, horizon=4), seed=0)
    with pytest.raises(ValueError, match=r"pass \[windows, 12, channels\]"):
        model(torch.zeros(1, 11, 3))
    with pytest.raises(ValueError, match="window = 24: use an odd number"):
        DLinearConfig(look_back=12, horizon=4, window=24)
