"""Small models in fp64, where equalities can be asked for to ten digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model

VOCABULARY = 31


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
