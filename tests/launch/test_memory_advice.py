"""What the planner says of a run that is, or would be, out of memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from launch import memory_advice, preflight, worker
from launch.memory import estimate_memory
from launch.memory_advice import check_memory, out_of_memory_advice
from launch.meshes import FRAGMENTATION, RESERVED_BYTES
from launch.recipe import Recipe, load_recipe
from trellis_dist.models.counts import parameter_counts

BASE = str(Path(__file__).with_name("base.toml"))
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0"), MemoryError()]


def large(*overrides: str) -> Recipe:
    return load_recipe("350m-c4", ["mesh.dp=2", *overrides])


def total(recipe: Recipe) -> int:
    counts = parameter_counts(recipe.model)
    return estimate_memory(recipe, counts=counts, mesh=recipe.mesh, cuda=False)["total"]


@pytest.mark.parametrize("error", ERRORS)
def test_a_rank_out_of_memory_says_what_would_fit(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_advice, "rank_memory", lambda ranks: 24 * 10**9)
    line = worker.error_line(error, large())
    assert len(line.splitlines()) == 1
    assert re.search(
        r"out of memory \(.*\): the planner estimates [\d.]+ GB a rank \(activations [\d.]+, ", line
    )
    settings = re.findall(r"(training\.[a-z_]+=\w+(?: with training\.micro_batch=1)?) \(", line)
    assert settings
    for setting in settings:
        changed = total(large(*setting.split(" with ")))
        assert changed * FRAGMENTATION + RESERVED_BYTES[False] < 24e9


def test_advice_never_hides_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr(memory_advice, "out_of_memory_advice", broken)
    assert "lower training.micro_batch" in worker.error_line(MemoryError("no"), large())


def test_where_no_one_change_is_enough_more_devices_are_asked_for() -> None:
    line = out_of_memory_advice(large("training.micro_batch=1"), memory=2 * 10**9)
    assert "more devices (trellis plan RECIPE --nodes N" in line


def test_a_change_is_named_where_the_estimate_thought_it_would_fit() -> None:
    line = out_of_memory_advice(load_recipe(BASE), memory=100 * 10**9)
    assert "what would fit: training.micro_batch=4" in line


def test_a_start_that_may_not_fit_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(BASE)
    said: list[str] = []
    preflight.check_machine(recipe, tmp_path, say=said.append)
    assert said == []
    monkeypatch.setattr(memory_advice, "rank_memory", lambda ranks: 450 * 10**6)
    preflight.check_machine(recipe, tmp_path, say=said.append)
    assert len(said) == 1
    assert "may be out of memory: the planner estimates" in said[0]


def test_only_a_state_that_no_gpu_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_advice, "_cuda", lambda: True)
    recipe = large("training.engine=local")
    monkeypatch.setattr(memory_advice, "rank_memory", lambda ranks: 10 * 10**9)
    assert "may be out of memory" in check_memory(recipe, ranks=2)
    monkeypatch.setattr(memory_advice, "rank_memory", lambda ranks: 3 * 10**9)
    with pytest.raises(ValueError, match="cannot fit its devices"):
        check_memory(recipe, ranks=2)
