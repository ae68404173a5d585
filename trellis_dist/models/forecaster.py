"""A forecaster over the language model's blocks: patches of each channel in, its next steps out.

Shapes: B windows, L look-back, C channels, H horizon, P patch length, N patches, dim features.

    x [B, L, C] -> normalised per window and channel -> patches [B C, N, P] -> linear -> blocks -> norm
      -> flat [B C, N dim] -> linear to [B C, H] -> the window's level and scale again -> [B, H, C]

Patches, channel independence and the flat head are PatchTST's (arXiv 2211.14730); the blocks are this
project's, with any mixer, and therefore causal over patches where PatchTST's encoder is bidirectional. The
head reads every patch, so no patch is lost to the forecast. No position is embedded: recurrences and rotary
attention have positions of their own, and the head has a weight for each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis_dist.models.block import Block
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.forecaster_config import ForecasterConfig
from trellis_dist.models.init import Constant, Normal, initialise, new_parameter
from trellis_dist.models.linear import linear
from trellis_dist.models.norm import RMSNorm
from trellis_dist.models.parallel_kind import ParallelKind

__all__ = ["Forecaster", "RevIN", "build_forecaster", "check_window", "patches_of"]

EPS = 1e-5


class Level(NamedTuple):
    """What ``RevIN`` took from windows: mean and standard deviation over time, each [B, 1, C]."""

    mean: Tensor
    deviation: Tensor


class RevIN(nn.Module):
    """Reversible instance normalisation with a learned affine map per channel (Kim et al., ICLR 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        replicated = ParallelKind.REPLICATED
        self.weight = new_parameter(channels, initial=Constant(1.0), kind=replicated)
        self.bias = new_parameter(channels, initial=Constant(0.0), kind=replicated)

    def normalise(self, x: Tensor) -> tuple[Tensor, Level]:
        """[B, L, C] -> the same with mean 0 and variance 1 over L, then the affine map; and what was taken.

        A constant series becomes zeros: the variance is raised by 1e-5.
        """
        mean = x.mean(1, keepdim=True)
        deviation = (x.var(1, correction=0, keepdim=True) + EPS).sqrt()
        return (x - mean) / deviation * self.weight + self.bias, Level(mean, deviation)

    def restore(self, y: Tensor, level: Level) -> Tensor:
        """The inverse of ``normalise``, for any number of steps: [B, T, C] -> [B, T, C]."""
        return (y - self.bias) / self.weight * level.deviation + level.mean


def patches_of(rows: Tensor, *, length: int, stride: int) -> Tensor:
    """[R, L] -> [R, N, length]: a patch every ``stride`` steps, the last value repeated ``stride`` times."""
    return F.pad(rows.unsqueeze(1), (0, stride), mode="replicate").squeeze(1).unfold(-1, length, stride)


class Forecaster(nn.Module):
    """Built by ``build_forecaster``, which also draws the weights."""

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config
        body, replicated = config.body, ParallelKind.REPLICATED
        self.normalisation = RevIN(config.channels)
        # Inputs have variance 1: a patch of them keeps it.
        spread = Normal(config.patch_length**-0.5)
        self.embedding_weight = new_parameter(body.dim, config.patch_length, initial=spread, kind=replicated)
        self.embedding_bias = new_parameter(body.dim, initial=Constant(0.0), kind=replicated)
        self.blocks = nn.ModuleList(Block(body, layer) for layer in range(body.num_layers))
        self.norm = RMSNorm(body.dim, eps=body.norm_eps)
        width = config.patches * body.dim
        # As torch's Linear spreads its draws: outputs begin well below the scale of what they forecast.
        small = Normal((3 * width) ** -0.5)
        self.head_weight = new_parameter(config.horizon, width, initial=small, kind=replicated)
        self.head_bias = new_parameter(config.horizon, initial=Constant(0.0), kind=replicated)

    def forward(self, x: Tensor) -> Tensor:
        """The next steps of windows: [B, L, C] -> [B, H, C].

        Raises:
            ValueError: ``x`` has another shape.
        """
        check_window(x, look_back=self.config.look_back, channels=self.config.channels)
        normal, level = self.normalisation.normalise(x)
        rows = normal.transpose(1, 2).flatten(0, 1)
        patches = patches_of(rows, length=self.config.patch_length, stride=self.config.stride)
        steps = self._head(self._body(patches)).view(len(x), self.config.channels, -1)
        return self.normalisation.restore(steps.transpose(1, 2), level)

    def _body(self, patches: Tensor) -> Tensor:
        """[R, N, P] -> [R, N, dim]."""
        hidden = self._drop(linear(patches, self.embedding_weight) + self.embedding_bias)
        context = SequenceContext()
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def _head(self, hidden: Tensor) -> Tensor:
        """[R, N, dim] -> [R, H]."""
        return linear(self._drop(hidden.flatten(1)), self.head_weight) + self.head_bias

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, training=self.training)


def check_window(x: Tensor, *, look_back: int, channels: int | None = None) -> None:
    """Refuse what is no [B, look_back, channels]; ``channels`` None takes any number."""
    expected = f"[windows, {look_back}, {'channels' if channels is None else channels}]"
    if x.dim() != 3 or x.shape[1] != look_back or channels not in (None, x.shape[2]):
        raise ValueError(f"a forecast was asked of {list(x.shape)}: pass {expected}")


def build_forecaster(
    config: ForecasterConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> Forecaster:
    """A forecaster with initial weights drawn from (seed, parameter name)."""
    model = Forecaster(config).to(dtype)
    initialise(model, seed)
    return model
