"""Settings that no run can train with are refused by their key."""

from __future__ import annotations

import pytest

from trellis_dist.training.config import OptimizerConfig, TrainingConfig

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "name, value",
    [
        *(("lr", value) for value in (0.0, -1.0, INF, NAN)),
        *(("eps", value) for value in (0.0, -1e-8, INF, NAN)),
        *((name, value) for name in ("beta1", "beta2") for value in (2.0, 1.0, -0.1, NAN)),
        *((name, value) for name in ("weight_decay", "clip_norm") for value in (-1.0, INF, NAN)),
    ],
)
def test_optimizer_constants_are_finite_and_in_range(name: str, value: float):
    with pytest.raises(ValueError, match=rf"optimizer\.{name} = {value}: use "):
        OptimizerConfig(**{name: value})


@pytest.mark.parametrize("name", ["z_loss", "first_step_timeout_s", "step_timeout_s"])
@pytest.mark.parametrize("value", [-1.0, INF, NAN])
def test_training_amounts_are_finite(name: str, value: float):
    with pytest.raises(ValueError, match=rf"training\.{name} = {value}: use 0 \(off\)"):
        TrainingConfig(steps=1, global_batch_tokens=1, **{name: value})


def test_the_ends_of_the_ranges_are_accepted():
    config = OptimizerConfig(beta1=0.0, beta2=0.0, weight_decay=0.0, clip_norm=0.0)
    assert config.weight_decay == 0.0


def test_at_least_one_forward_pass_comes_first():
    with pytest.raises(ValueError, match=r"training\.forwards_first = 0: use 1 or more micro-batches"):
        TrainingConfig(steps=1, global_batch_tokens=1, forwards_first=0)
