"""The planner's memory: against the record of real ranks, and against a small real step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plan_memory
from benchmarks.plan_memory import CASES, KEPT, RESULT, case_recipe, launcher_malloc
from benchmarks.plan_memory_rank import live_peaks, make_rows
from launch.planning import activations
from launch.planning.memory import NO_PARTS, PHASES, estimate_memory, phase_peaks
from launch.recipe import Recipe, load_recipe
from trellis_dist.files import read_json
from trellis_dist.models.counts import parameter_counts

RECORD = read_json(RESULT)
PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
WITHIN = 0.10
SMALL = (
    "model.vocab_size=2048",
    "data.tokenizer.vocab_size=2000",
    "model.dim=128",
    "model.num_heads=2",
    "model.num_layers=3",
    "data.sequence_length=256",
    "training.global_batch_tokens=256",
    "training.micro_batch=1",
    "training.precision=fp32",
    "training.engine=local",
    "mesh.dp=1",
)


def estimate(recipe: Recipe) -> dict[str, int]:
    counts = parameter_counts(recipe.model)
    return estimate_memory(recipe, counts=counts, mesh=recipe.mesh, cuda=False)


def test_the_record_has_every_case_at_50m_parameters() -> None:
    assert set(RECORD["cases"]) == set(CASES)
    for name in CASES:
        assert parameter_counts(case_recipe(name).model).total >= 50_000_000


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_within_a_tenth_of_what_ranks_took(name: str) -> None:
    """Made here again from the recipe, so that neither the record nor the planner drifts from the other."""
    total, measured = estimate(case_recipe(name))["total"], RECORD["cases"][name]
    assert total == pytest.approx(measured["live"], rel=WITHIN)
    assert total == pytest.approx(measured["resident"], rel=WITHIN)


@pytest.mark.parametrize("name", KEPT)
def test_resident_estimates_are_within_a_tenth_of_what_the_launchers_ranks_took(name: str) -> None:
    """With the allocator's settings of `trellis train`; a change of those asks for new measurements."""
    assert RECORD["kept_malloc"] == launcher_malloc()
    resident = estimate(case_recipe(name))["resident"]
    assert resident == pytest.approx(RECORD["kept"][name]["kept"], rel=WITHIN)


def test_a_gpu_has_no_resident_estimate() -> None:
    recipe = case_recipe("local")
    counts = parameter_counts(recipe.model)
    assert estimate_memory(recipe, counts=counts, mesh=recipe.mesh, cuda=True)["resident"] == 0


def test_the_page_has_the_record() -> None:
    from benchmarks import plan_time

    page = PAGE.read_text(encoding="utf-8")
    assert plan_memory.table(RECORD) in page
    assert plan_memory.kept_table(RECORD) in page
    assert plan_time.table(read_json(plan_time.RESULT)) in page


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_small_step_takes_what_the_planner_says(checkpointing: str) -> None:
    recipe = load_recipe("125m-c4", [*SMALL, f"training.activation_checkpointing={checkpointing}"])
    counts = parameter_counts(recipe.model)
    measured = live_peaks(recipe, make_rows(recipe, rank=0))
    planned = phase_peaks(recipe, counts=counts, mesh=recipe.mesh, cuda=False)
    assert max(planned.values()) == pytest.approx(max(measured[name] for name in PHASES), rel=0.05)
    for name in ("forward", "backward", "update"):
        assert planned[name] == pytest.approx(measured[name], rel=0.08), name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("pattern", ["gated_deltanet", "gsa", "mamba2,sliding_window"])
def test_a_step_with_baselines_takes_what_the_planner_says(pattern: str, checkpointing: str) -> None:
    changes = [f"model.pattern={json.dumps(pattern.split(','))}", "model.attention.sliding_window=64"]
    changes += ["data.sequence_length=640", "training.global_batch_tokens=640"]  # ten chunks: extrapolated
    recipe = load_recipe("125m-c4", [*SMALL, *changes, f"training.activation_checkpointing={checkpointing}"])
    counts = parameter_counts(recipe.model)
    measured = live_peaks(recipe, make_rows(recipe, rank=0))
    planned = phase_peaks(recipe, counts=counts, mesh=recipe.mesh, cuda=False)
    for name in ("forward", "backward", "update"):
        assert planned[name] == pytest.approx(measured[name], rel=WITHIN), name


def test_the_parts_sum_to_the_fullest_phase() -> None:
    for name in CASES:
        recipe = case_recipe(name)
        memory = estimate(recipe)
        parts = [size for part, size in memory.items() if part not in NO_PARTS]
        counts = parameter_counts(recipe.model)
        peaks = phase_peaks(recipe, counts=counts, mesh=recipe.mesh, cuda=False)
        assert memory["total"] == sum(parts) == max(peaks.values())


def test_the_triton_form_keeps_memories_as_far_apart_as_the_planner_thinks() -> None:
    stages = pytest.importorskip("kernels.triton.stages", reason="triton is not installed here")
    assert stages.SEGMENT == activations._SEGMENT_TOKENS
