"""The planner's activation estimate against what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.plan import defaults, make_plan
from launch.recipe import load_recipe
from trellis_dist.models.language_model import build_language_model

BASE = str(Path(__file__).with_name("base.toml"))


@pytest.mark.parametrize("override", ["model.num_layers=4", "model.dim=256", "model.trellis.slots=64"])
def test_activations_are_estimated_within_a_fifth(override: str) -> None:
    recipe = load_recipe(BASE, [override, "training.micro_batch=8", "training.global_batch_tokens=8192"])
    model = build_language_model(recipe.model, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(8, recipe.data.sequence_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss_sum(tokens, tokens)
    measured = sum(storage.nbytes() for storage in kept.values())
    estimate = make_plan(recipe)["memory_per_rank_bytes"]["activations_estimate"]
    assert estimate == pytest.approx(measured, rel=0.2)


def test_defaults_leave_out_what_a_recipe_must_give() -> None:
    known = defaults()
    assert known["model.trellis.slots"] == 64
    assert "model.dim" not in known
    assert "training.steps" not in known
