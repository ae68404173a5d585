"""What a model section refuses, and what it derives."""

from __future__ import annotations

import pytest

from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig

FIELDS = {"vocab_size": 10, "num_layers": 3, "dim": 128, "num_heads": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 0}, "model.num_layers = 0"),
        ({"num_heads": 3}, "no multiple of model.num_heads = 3"),
        ({"pattern": ()}, "model.pattern is empty"),
        ({"dim": 12, "pattern": ("attention",)}, "rotary needs an even head"),
        ({"mlp_hidden": 0}, "model.mlp_hidden = 0"),
        ({"init_std": 0.0}, "model.init_std = 0.0"),
        ({"norm_eps": -1.0}, "model.norm_eps = -1.0"),
        ({"pattern": ("mamba",)}, "model.pattern names 'mamba'"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**FIELDS, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": 0}, "slots = 0"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"step_size_max": 0.0}, "step_size_max = 0.0"),
        ({"gates": ()}, "gates is empty"),
        ({"gates": ("open",)}, "gates names 'open'"),
        ({"conv_kernel": -1}, "conv_kernel = -1"),
        ({"readout": "silu_rms", "readout_affine": True}, "leave readout_affine out"),
        ({"readout": "silu", "readout_affine": True}, "readout = 'silu', .* leave readout_affine out"),
        ({"head_norm_eps": 0.0}, "head_norm_eps = 0.0"),
        ({"update": "corrected", "step_bound": "token"}, "steps of 2 .* set step_size_max = 1"),
        ({"update": "corrected", "chunk_size": 1}, "steps of 2 .* below 2 only"),
        ({"update": "corrected", "step_size_max": 300.0}, "steps of 4.6875"),
    ],
)
def test_impossible_mixers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrellisConfig(**change)


def test_corrected_steps_stay_below_two():
    assert TrellisConfig(update="corrected").largest_step == 2 / 64
    assert TrellisConfig(update="corrected", step_bound="token", step_size_max=1.0).largest_step == 1.0
    assert TrellisConfig(step_bound="token").largest_step == 2.0


def test_an_attention_window_holds_a_token():
    with pytest.raises(ValueError, match="window = 0"):
        AttentionConfig(window=0)


def test_mlp_width_is_a_multiple_of_64():
    assert ModelConfig(**FIELDS).mlp_width == 384
    assert ModelConfig(**{**FIELDS, "dim": 768}).mlp_width == 2048
    assert ModelConfig(**FIELDS, mlp_hidden=100).mlp_width == 100


def test_layer_kinds_cycle():
    config = ModelConfig(**FIELDS, pattern=("trellis", "attention"))
    assert [config.layer_kind(layer) for layer in range(3)] == ["trellis", "attention", "trellis"]
