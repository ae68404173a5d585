"""The planner's activation estimate against what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.defaults import defaults
from launch.planning.memory import NO_PARTS, estimate_memory, held_state
from launch.planning.plan import make_plan
from launch.recipe import load_recipe
from tests.distributed import gloo_pool
from tests.training.engine_cases import ADAM, build, train
from trellis_dist.models.carry import Carry
from trellis_dist.models.counts import parameter_counts
from trellis_dist.models.language_model import build_language_model

BASE = str(Path(__file__).with_name("base.toml"))


@pytest.mark.parametrize("override", ["model.num_layers=4", "model.dim=256", "model.trellis.slots=64"])
def test_kept_activations_are_what_autograd_keeps(override: str) -> None:
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
    memory = make_plan(recipe)["memory_per_rank_bytes"]
    assert memory["activations"] + memory["loss"] == pytest.approx(measured, rel=0.03)


def test_defaults_leave_out_what_a_recipe_must_give() -> None:
    known = defaults()
    assert known["model.trellis.slots"] == 64
    assert "model.dim" not in known
    assert "training.steps" not in known


# Parts of the state of P parameters, in bytes per parameter, bf16 on dp 2 x sp 2.
STATE = {
    "engine=local": {"weights": 2, "gradients": 4, "master_weights": 4, "optimizer_moments": 8},
    "zero_stage=1": {"weights": 2, "gradients": 6, "master_weights": 1, "optimizer_moments": 2},
    "zero_stage=2": {"weights": 2, "gradients": 1, "master_weights": 1, "optimizer_moments": 2},
    "zero_stage=3": {"weights": 0.5, "gradients": 1, "master_weights": 1, "optimizer_moments": 2},
    "engine=fsdp2": {"weights": 2, "gradients": 2, "master_weights": 0, "optimizer_moments": 4},
}
MESH = ["mesh.dp=2", "mesh.sp=2", "data.chunk_aligned=true", "training.precision=bf16"]


def held(*overrides: str) -> tuple[dict[str, int], int]:
    """Bytes of the state, all gradients with it, and the number of parameters."""
    recipe = load_recipe(BASE, overrides)
    counts = parameter_counts(recipe.model)
    return held_state(recipe, counts=counts, mesh=recipe.mesh), counts.total


def estimate(*overrides: str) -> tuple[dict[str, int], int]:
    """Of a rank on a GPU, and the number of parameters."""
    recipe = load_recipe(BASE, overrides)
    counts = parameter_counts(recipe.model)
    return estimate_memory(recipe, counts=counts, mesh=recipe.mesh, cuda=True), counts.total


@pytest.mark.parametrize("setting", STATE)
def test_state_is_divided_as_the_engine_divides_it(setting: str) -> None:
    memory, parameters = held(*MESH, f"training.{setting}")
    expected = {part: per * parameters for part, per in STATE[setting].items()}
    assert {part: memory[part] for part in expected} == pytest.approx(expected, abs=16)
    assert (memory["gathered_weights"] > 0) == (setting in ("zero_stage=3", "engine=fsdp2"))


@pytest.mark.parametrize("carry_rows", [1, 4])
def test_carried_states_are_those_that_a_run_keeps(carry_rows: int) -> None:
    settings = ["mesh.dp=1", "training.precision=fp32", f"data.carry_rows={carry_rows}"]
    recipe = load_recipe(BASE, [*settings, "training.global_batch_tokens=8192"])
    rows, length = recipe.global_rows, recipe.data.sequence_length
    model = build_language_model(recipe.model, seed=0)
    tokens, carry = torch.zeros(rows, length, dtype=torch.long), Carry([0] * rows)
    with torch.no_grad():
        bounds = torch.arange(0, rows * length + 1, length)
        model.loss_sum(tokens, tokens, cu_seqlens=bounds, carry=carry)
    kept = [x for state in carry.states() for x in vars(state).values()]
    measured = sum(x.numel() * x.element_size() for x in kept) if carry_rows > 1 else 0
    assert make_plan(recipe)["memory_per_rank_bytes"]["carried_states"] == measured


@pytest.mark.parametrize("setting, host", [("engine=local", 12), ("zero_stage=1", 3), ("engine=fsdp2", 8)])
def test_offloaded_state_is_the_hosts(setting: str, host: float) -> None:
    memory, parameters = estimate(*MESH, f"training.{setting}", "training.offload_optimizer=true")
    assert memory["host_state"] == pytest.approx(host * parameters, abs=16)
    assert memory["master_weights"] == memory["optimizer_moments"] == 0
    assert memory["total"] == sum(value for part, value in memory.items() if part not in NO_PARTS)


@pytest.mark.parametrize(
    "setting, per", [("engine=local", 14), ("zero_stage=1", 5), ("zero_stage=3", 3.5), ("engine=fsdp2", 6)]
)
def test_a_save_in_the_background_copies_what_rank_0_writes(setting: str, per: float) -> None:
    """bf16 weights, fp32 masters and two moments, on 2 x 2 ranks; FSDP2's weights are their own masters."""
    memory, parameters = estimate(*MESH, f"training.{setting}")
    assert memory["host_snapshot"] == pytest.approx(per * parameters, abs=16)
    foreground, _ = estimate(*MESH, f"training.{setting}", "checkpoint.background=false")
    assert foreground["host_snapshot"] == 0


@pytest.mark.parametrize("setting", ["precision=fp32", "offload_optimizer=true"])
def test_zero_1_keeps_gradients_once_in_fp32_or_with_offload(setting: str) -> None:
    memory, parameters = held(*MESH, "training.zero_stage=1", f"training.{setting}")
    assert memory["gradients"] == 4 * parameters


def gradient_bytes(engine: str) -> tuple[str, float]:
    """The optimizer that DeepSpeed took; gradient bytes per parameter after the last backward pass."""
    built, found = build(engine, ADAM), []
    parameters, reduce, zero = list(built.model.parameters()), built._reduce, built._engine.optimizer

    def measure() -> None:
        held = [parameter.grad for parameter in parameters if parameter.grad is not None]
        found.append(sum(it.nbytes for it in [*held, *getattr(zero, "fp32_groups_gradients_flat", [])]))
        reduce()

    built._reduce = measure
    train(built, range(2), micro_batch=1)
    return type(zero).__name__, found[-1] / sum(parameter.numel() for parameter in parameters)


def test_zero_1_of_bf16_keeps_the_gradients_twice() -> None:
    for name, held in gloo_pool(2).run(gradient_bytes, "zero1 bf16"):
        assert name == "BF16_Optimizer"
        assert held == pytest.approx(STATE["zero_stage=1"]["gradients"], rel=0.05)  # with some padding
    for engine in ("zero1 bf16 offload", "zero1"):
        assert {name for name, _ in gloo_pool(2).run(gradient_bytes, engine)} == {"DeepSpeedZeroOptimizer"}


def fullest(*overrides: str) -> int:
    batch = ["training.global_batch_tokens=8192", "training.micro_batch=2"]
    settings = [*batch, "training.precision=fp32", *overrides]
    memory = make_plan(load_recipe(BASE, settings))["memory_per_rank_bytes"]
    return int(memory["total"])


def test_activations_grow_with_the_forward_passes_that_run_first() -> None:
    one, two = fullest(), fullest("training.forwards_first=2")
    assert one < two < 2 * one
    assert fullest("training.activation_checkpointing=full") < one
