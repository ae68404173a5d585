"""DLinear (Zeng et al., AAAI 2023, arXiv 2205.13504): the baseline that forecasters have to beat.

Shapes: B windows, L look-back, C channels, H horizon.

    trend = moving average of x over 25 steps, its ends repeated        forecast = W_s (x - trend) + W_t trend
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.forecaster import check_window
from trellis_dist.models.forecaster_config import DLinearConfig
from trellis_dist.models.init import Constant, initialise, new_parameter
from trellis_dist.models.linear import linear
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["DLinear", "build_dlinear", "trend_of"]


def trend_of(rows: Tensor, *, window: int) -> Tensor:
    """Moving average over ``window`` steps centred on each, the ends repeated: [B, C, L] -> [B, C, L]."""
    half = window // 2
    return F.avg_pool1d(F.pad(rows, (half, half), mode="replicate"), window, stride=1)


class DLinear(nn.Module):
    """One linear map of the trend and one of the rest, for all channels; built by ``build_dlinear``."""

    def __init__(self, config: DLinearConfig) -> None:
        super().__init__()
        self.config = config
        shape, replicated = (config.horizon, config.look_back), ParallelKind.REPLICATED
        # Weights average what was read, as in the authors' models/DLinear.py, the same for every seed;
        # biases, which are drawn there, begin at zero.
        average, zero = Constant(1 / config.look_back), Constant(0.0)
        self.seasonal_weight = new_parameter(*shape, initial=average, kind=replicated)
        self.seasonal_bias = new_parameter(config.horizon, initial=zero, kind=replicated)
        self.trend_weight = new_parameter(*shape, initial=average, kind=replicated)
        self.trend_bias = new_parameter(config.horizon, initial=zero, kind=replicated)

    def forward(self, x: Tensor) -> Tensor:
        """The next steps of windows: [B, L, C] -> [B, H, C].

        Raises:
            ValueError: ``x`` has another length.
        """
        check_window(x, look_back=self.config.look_back)
        rows = x.transpose(1, 2)
        trend = trend_of(rows, window=self.config.window)
        seasonal = linear(rows - trend, self.seasonal_weight) + self.seasonal_bias
        return (seasonal + linear(trend, self.trend_weight) + self.trend_bias).transpose(1, 2)


def build_dlinear(config: DLinearConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> DLinear:
    """A DLinear with its initial weights, which do not depend on ``seed``."""
    model = DLinear(config).to(dtype)
    initialise(model, seed)
    return model
