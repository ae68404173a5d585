"""Models of equal size: the width of the MLP makes a baseline as large as what it is compared with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import parameter_counts

__all__ = ["TOLERANCE", "equal_width", "of_equal_size"]

TOLERANCE = 0.02


def equal_width(
    config: ModelConfig, *, parameters: int, tolerance: float = TOLERANCE, multiple: int = 8
) -> int:
    """``model.mlp_hidden`` with which ``config`` has ``parameters`` parameters, as nearly as can be.

    The count is linear in the width, so that two counts (on torch's meta device) give it.

    Args:
        config: the model; its own width does not matter.
        parameters: the total to reach (`parameter_counts`'s ``total``).
        tolerance: how far off it may be, as a share.
        multiple: the width is a multiple of this.

    Raises:
        ValueError: no width comes that near: the rest of the model alone is too large.
    """
    one, two = (_total(config, width) for width in (multiple, 2 * multiple))
    width = round((parameters - one) / (two - one) + 1) * multiple
    if width >= multiple:
        found = _total(config, width)
        if abs(found - parameters) <= tolerance * parameters:
            return width
    least = one if width < multiple else found
    raise ValueError(
        f"no model.mlp_hidden makes a model of {'+'.join(config.pattern)} layers {parameters:,} parameters "
        f"large, within {tolerance:.0%}: the nearest has {least:,}; change model.dim or model.num_layers"
    )


def of_equal_size(config: ModelConfig, other: ModelConfig, *, tolerance: float = TOLERANCE) -> ModelConfig:
    """``config`` with the MLP that makes it as large as ``other``; raises as `equal_width`."""
    parameters = parameter_counts(other).total
    return replace(config, mlp_hidden=equal_width(config, parameters=parameters, tolerance=tolerance))


@cache
def _total(config: ModelConfig, width: int) -> int:
    return parameter_counts(replace(config, mlp_hidden=width)).total
