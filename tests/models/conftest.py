"""Small models in fp64, where equalities can be asked for to ten digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model

VOCABULARY = 31

# Models by name, as options of ``tiny``, that packing and decoding are both asked about.
CASES: dict[str, dict[str, Any]] = {
    "sliding window": {
        "pattern": ("trellis", "sliding_window"),
        "attention": AttentionConfig(sliding_window=3),
    },
    "deltanet": {"pattern": ("deltanet",), "baselines": {"conv_kernel": 0}},
    "gated_deltanet": {"pattern": ("gated_deltanet",), "baselines": {"conv_values": False}},
    "linear_attention, mamba2": {"pattern": ("linear_attention", "mamba2")},
    "abc": {"pattern": ("abc",)},
    "gsa": {"pattern": ("gsa",), "baselines": {"chunk_size": 3}},
    "rwkv7": {"pattern": ("rwkv7",)},
    "ttt_linear": {"pattern": ("ttt_linear",)},
    "titans": {"pattern": ("titans",), "baselines": {"conv_kernel": 0}},
    "titans, two layers": {"pattern": ("titans",), "baselines": {"titans_depth": 2}},
    "rates, convolved values": {
        "trellis": {"gate_form": "rate", "conv_values": True, "value_gates": "own", "alpha_norm": "l2"}
    },
    "convolved targets": {"trellis": {"conv_targets": True}},
    "values are the targets": {"trellis": {"targets": "values", "slots": 8, "conv_values": True}},
    "all convolved, an identity to begin with, a skip": {
        "trellis": {
            "skip_values": True,
            "conv_values": True,
            "conv_targets": True,
            "learned_initial_memory": True,
            "initial_value_memory": "identity",
        }
    },
}


def tiny_config(
    *, trellis: dict[str, Any] | None = None, baselines: dict[str, Any] | None = None, **overrides: Any
) -> ModelConfig:
    """Two layers of width 16, chunks of 4 tokens; ``init_std`` large enough that every path matters."""
    options = TrellisConfig(**{"slots": 6, "chunk_size": 4, **(trellis or {})})
    others = BaselineConfig(**{"slots": 5, "chunk_size": 4, "mini_batch": 4, **(baselines or {})})
    fields = {"vocab_size": VOCABULARY, "num_layers": 2, "dim": 16, "num_heads": 2, "init_std": 0.3}
    return ModelConfig(**{**fields, "trellis": options, "baselines": others, **overrides})


@pytest.fixture
def config() -> Callable[..., ModelConfig]:
    return tiny_config


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    def build(*, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> LanguageModel:
        return build_language_model(tiny_config(**overrides), seed=seed, dtype=dtype)

    return build


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return draw
