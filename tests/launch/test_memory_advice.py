"""What the planner says of a run that is, or would be, out of memory."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from launch import preflight, worker
from launch.planning import advice, rank_memory, remedies
from launch.planning.advice import check_memory, killed_advice, out_of_memory_advice
from launch.planning.memory import estimate_memory
from launch.planning.meshes import FRAGMENTATION, RESERVED_BYTES
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
    monkeypatch.setattr(advice, "rank_memory", lambda ranks: 24 * 10**9)
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

    monkeypatch.setattr(advice, "out_of_memory_advice", broken)
    assert "lower training.micro_batch" in worker.error_line(MemoryError("no"), large())


def test_where_no_one_change_is_enough_more_devices_are_asked_for() -> None:
    line = out_of_memory_advice(large("training.micro_batch=1"), memory=10**9)
    assert "nothing that this recipe can change is enough here (the least is " in line
    assert "more devices (trellis plan RECIPE --nodes N" in line


def test_where_the_estimate_thought_it_would_fit_what_saves_most_is_named_first() -> None:
    line = out_of_memory_advice(load_recipe(BASE), memory=100 * 10**9)
    assert "what would fit" not in line
    sizes = [
        float(size) for size in re.findall(r"\(([\d.]+) GB\)", line.partition("what would take less: ")[2])
    ]
    assert len(sizes) == 3
    assert sizes == sorted(sizes)


def test_what_a_dying_rank_holds_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.3 GB left to two ranks and 20 GB held, what takes 15 fits."""
    monkeypatch.setattr(rank_memory, "_available", lambda proc: 3 * 10**8)
    monkeypatch.setattr(rank_memory, "left_in_groups", lambda **_: [])
    sizes = rank_memory._sizes
    monkeypatch.setattr(rank_memory, "_sizes", lambda path: sizes(path) | {"RssAnon": 20 * 10**9})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = out_of_memory_advice(large())
    assert "of 20.15; what would fit: training.micro_batch=" in line
    monkeypatch.delenv("RANK")  # in a launcher it is not
    assert "of 0.15; nothing that this recipe can change is enough here" in out_of_memory_advice(large())


def test_levers_are_combined_where_one_is_not_enough_and_none_is_named_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(advice, "_cuda", lambda: True)
    monkeypatch.setattr(advice, "host_share", lambda ranks: 64 * 10**9)
    alone = load_recipe("1b-c4", ["mesh.dp=1"])
    line = out_of_memory_advice(alone, memory=16 * 10**9)
    assert re.search(r"what would fit: training\.[a-z_=]+ with training\.offload_optimizer=true", line)
    assert "zero_stage=" not in line  # one rank has nobody to divide with
    monkeypatch.setattr(advice, "host_share", lambda ranks: 10**9)  # no room for what is offloaded
    assert "offload_optimizer" not in out_of_memory_advice(alone, memory=16 * 10**9)
    many = out_of_memory_advice(load_recipe("1b-c4", ["mesh.dp=8"]), memory=16 * 10**9)
    assert "zero_stage=" in many
    assert "mesh.tp=2 with mesh.dp=4" in many


def test_shorter_rows_are_the_last_thing_to_change() -> None:
    rows = ["data.sequence_length=8192", "training.micro_batch=1", "mesh.dp=1", "training.engine=local"]
    recipe = load_recipe(BASE, [*rows, "training.activation_checkpointing=full"])
    search = remedies.Search(recipe, counts=parameter_counts(recipe.model), cuda=False, host=0)
    found, least = search.reach(0.9 * total(recipe))
    assert [dict(remedy.settings) for remedy in found] == [{"data.sequence_length": 4096}]
    assert search.reach(0) == ([], least)
    found, _ = dataclasses.replace(search, recipe=load_recipe(BASE, rows)).reach(0.9 * total(recipe))
    assert {key for remedy in found for key in remedy.settings} >= {"data.sequence_length"}
    found, _ = dataclasses.replace(search, recipe=load_recipe(BASE, rows)).reach(1.01 * total(recipe))
    assert [dict(remedy.settings) for remedy in found] == [{"training.activation_checkpointing": "full"}]


def test_a_killed_rank_is_compared_with_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "host_share", lambda ranks: 24 * 10**9)
    assert "of 24.00; what would fit: training.micro_batch=" in killed_advice(large(), here=2)
    small = killed_advice(load_recipe(BASE), here=2)
    assert re.fullmatch(r"the planner estimates 0\.\d+ GB a rank \(.*\) of 24\.00", small)
    monkeypatch.setattr(advice, "_cuda", lambda: True)
    assert "in host memory the planner expects" in killed_advice(large(), here=2)


def test_a_start_that_may_not_fit_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(BASE)
    said: list[str] = []
    preflight.check_machine(recipe, tmp_path, say=said.append)
    assert said == []
    monkeypatch.setattr(advice, "rank_memory", lambda ranks: 450 * 10**6)
    preflight.check_machine(recipe, tmp_path, say=said.append)
    assert len(said) == 1
    assert "may be out of memory: the planner estimates" in said[0]


def test_only_a_state_that_no_gpu_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "_cuda", lambda: True)
    recipe = large("training.engine=local")
    monkeypatch.setattr(advice, "rank_memory", lambda ranks: 10 * 10**9)
    assert "may be out of memory" in check_memory(recipe, ranks=2)
    monkeypatch.setattr(advice, "rank_memory", lambda ranks: 3 * 10**9)
    with pytest.raises(ValueError, match="cannot fit its devices"):
        check_memory(recipe, ranks=2)
