"""Models by name, each with the settings it is trained with.

A name is "dlinear", a layer kind of the registry ("trellis", "attention", ...), or "trellis-corrected".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from trellis_dist.models.baseline_config import BASELINES, BaselineConfig
from trellis_dist.models.config import LayerKind, ModelConfig, TrellisConfig
from trellis_dist.models.dlinear import build_dlinear
from trellis_dist.models.forecaster import Forecaster, build_forecaster
from trellis_dist.models.forecaster_config import DLinearConfig, ForecasterConfig
from trellis_dist.models.registry import MIXERS

__all__ = ["ForecastTraining", "Shape", "build", "known_models", "settings_of", "training_of"]

LAYERS, DIM, HEADS, SLOTS = 2, 64, 2, 32
# Hidden features of Trellis's MLP; every other mixer's is a multiple of 8 that makes its model as large.
MLP, MULTIPLE = 128, 8
# Of 22 patches: chunks of Trellis are part of the function, those of the baselines a matter of speed.
CHUNK, BASELINE_CHUNK = 8, 32
# math.md: the corrected update in its intended form.
CORRECTED: dict[str, Any] = {
    "update": "corrected",
    "phi": "tanh",
    "readout": "silu_rms",
    "step_bound": "token",
    "step_size_max": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class ForecastTraining:
    """Adam on the mean squared error, stopped when validation no longer improves.

    Attributes:
        batch_size: windows a step.
        windows: drawn anew for each epoch from those of training, without repetition; None takes all.
        validation_every: of the validation windows, one in this many is scored after each epoch.
        learning_rate: of the first two epochs.
        decay: what each later epoch multiplies the rate by.
        epochs: at most.
        patience: epochs without a better validation error before it ends.
        clip_norm: largest norm of a gradient; None clips none.
    """

    batch_size: int = 32
    windows: int | None = 2048
    validation_every: int = 4
    learning_rate: float = 1e-3
    decay: float = 0.5
    epochs: int = 6
    patience: int = 3
    clip_norm: float | None = 1.0


# The older scripts of its authors (cure-lab/LTSF-Linear, DLinear not Linear): ETTh1, Exchange by horizon.
DLINEAR = ForecastTraining(
    batch_size=8, windows=None, validation_every=1, learning_rate=1e-4, epochs=10, clip_norm=None
)
DLINEAR_EXCHANGE = {
    336: replace(DLINEAR, batch_size=32, learning_rate=5e-4),
    720: replace(DLINEAR, batch_size=32, learning_rate=5e-3),
}


@dataclass(frozen=True)
class Shape:
    """Of one problem: steps read, steps forecast, channels."""

    look_back: int
    horizon: int
    channels: int


def known_models() -> tuple[str, ...]:
    """Every name that ``build`` takes."""
    return ("dlinear", "trellis", "trellis-corrected", *sorted(set(MIXERS) - {"trellis"}))


def training_of(name: str, *, dataset: str, horizon: int) -> ForecastTraining:
    """The settings a model of this name is trained with; those of DLinear differ by problem."""
    if name != "dlinear":
        return ForecastTraining()
    if dataset == "exchange":
        return DLINEAR_EXCHANGE.get(horizon, replace(DLINEAR, learning_rate=5e-4))
    return DLINEAR


def config_of(name: str, shape: Shape) -> DLinearConfig | ForecasterConfig:
    """The configuration of a model of this name: 2 blocks of width 64 in all but DLinear, of Trellis's size.

    Raises:
        ValueError: no such name.
    """
    if name not in known_models():
        raise ValueError(f"no forecaster is called {name!r}: use {', '.join(known_models())}")
    if name == "dlinear":
        return DLinearConfig(look_back=shape.look_back, horizon=shape.horizon)
    return _mixer_config(name, shape, mlp=MLP if name == "trellis" else _equal_width(name, shape))


@cache
def _equal_width(name: str, shape: Shape) -> int:
    """Hidden features with which a mixer's model comes nearest to the parameters of Trellis's.

    The count is linear in the width, so that two counts give it.
    """
    wanted = _parameters("trellis", shape, mlp=MLP)
    one, two = (_parameters(name, shape, mlp=width) for width in (MULTIPLE, 2 * MULTIPLE))
    width = round((wanted - one) / (two - one) + 1) * MULTIPLE
    assert width >= MULTIPLE, f"{name} is larger than Trellis without an MLP"
    return width


def _parameters(name: str, shape: Shape, *, mlp: int) -> int:
    """Of the model, on torch's meta device."""
    with torch.device("meta"):
        model = Forecaster(_mixer_config(name, shape, mlp=mlp))
    return sum(parameter.numel() for parameter in model.parameters())


def _mixer_config(name: str, shape: Shape, *, mlp: int) -> ForecasterConfig:
    corrected = CORRECTED if name == "trellis-corrected" else {}
    kind = cast(LayerKind, name.removesuffix("-corrected"))
    body = ModelConfig(
        vocab_size=1,
        num_layers=LAYERS,
        dim=DIM,
        num_heads=HEADS,
        mlp_hidden=mlp,
        pattern=(kind,),
        trellis=TrellisConfig(slots=SLOTS, chunk_size=CHUNK, **corrected),
        baselines=BaselineConfig(slots=SLOTS, chunk_size=BASELINE_CHUNK),
    )
    return ForecasterConfig(
        look_back=shape.look_back, horizon=shape.horizon, channels=shape.channels, body=body
    )


def settings_of(name: str, shape: Shape, *, dataset: str) -> dict[str, Any]:
    """All that decides a run of this name but its data and seed, as JSON takes it.

    Sections that its layers do not read are left out: they may grow without making it another run.
    """
    model = asdict(config_of(name, shape))
    if "body" in model:
        for section in ("trellis", "attention", "baselines"):
            if section not in _sections_read(name):
                del model["body"][section]
    training = training_of(name, dataset=dataset, horizon=shape.horizon)
    return {"model": model, "training": asdict(training)}


def _sections_read(name: str) -> tuple[str, ...]:
    if name.startswith("trellis"):
        return ("trellis",)
    return ("baselines",) if name in BASELINES else ("attention",)


def build(name: str, shape: Shape, *, seed: int) -> nn.Module:
    """A model of this name with its initial weights.

    Raises:
        ValueError: no such name.
    """
    config = config_of(name, shape)
    if isinstance(config, DLinearConfig):
        return build_dlinear(config, seed=seed)
    return build_forecaster(config, seed=seed)
