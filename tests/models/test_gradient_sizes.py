"""Gradients of fresh models do not grow with the length of the rows."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.models.language_model import build_language_model


@pytest.mark.parametrize("kind", get_args(LayerKind))
def test_long_rows_have_gradients_of_the_size_of_short_ones(kind):
    """At the defaults of every option, of the mean loss of a token."""
    config = ModelConfig(vocab_size=64, num_layers=4, dim=64, num_heads=2, pattern=(kind,))
    model = build_language_model(config, seed=0)
    stream = torch.randint(64, (1, 1025), generator=torch.Generator().manual_seed(0))
    norms = []
    for rows in (stream[:, :65], stream):
        model.zero_grad()
        x, y = rows[:, :-1], rows[:, 1:]
        (model.loss_sum(x, y) / x.numel()).backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
    short, long = norms
    assert long < 10 * short, f"{kind}: {short:.2g} over 64 tokens, {long:.2g} over 1,024"
