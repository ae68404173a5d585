"""A plan for a cluster: its numbers, the ways that are ranked, the times that are predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.cluster_model import CPU_CORE, DEVICES, Cluster, cluster_from
from launch.plan import make_plan, render_plan
from launch.recipe import load_recipe
from launch.step_time import predict, wavefront_seconds
from trellis_dist.files import read_json
from trellis_dist.models.counts import parameter_counts

BASE = str(Path(__file__).with_name("base.toml"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FOUR = dataclasses.replace(DEVICES["h100"], devices_per_node=4)


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return make_plan(load_recipe(BASE, ["mesh.dp=4", "training.micro_batch=4"]), FOUR)


def test_ways_are_ranked_by_predicted_time_and_fit(plan: dict[str, Any]) -> None:
    steps = [one["step_seconds"] for one in plan["candidates"]]
    assert len(steps) > 20
    assert steps == pytest.approx(sorted(steps), abs=1e-4)
    for one in plan["candidates"]:
        assert one["mesh"]["dp"] * one["mesh"]["sp"] * one["mesh"]["tp"] == 4
        assert one["memory_per_rank_bytes"]["total"] < FOUR.memory_bytes
        assert sum(one["step_seconds_by_part"].values()) == pytest.approx(one["step_seconds"])
        assert one["days"] == pytest.approx(plan["batch"]["steps"] * one["step_seconds"] / 86400)
    assert {one["engine"] for one in plan["candidates"]} == {"local", "deepspeed", "fsdp2"}
    assert max(one["mesh"]["sp"] for one in plan["candidates"]) > 1


def test_the_settings_of_a_way_are_that_way(plan: dict[str, Any]) -> None:
    found = plan["candidates"]
    for one in (
        found[0],
        next(it for it in found if it["mesh"]["sp"] > 1 and it["mesh"]["tp"] > 1),
        found[-1],
    ):
        again = make_plan(load_recipe(BASE, one["set"]), FOUR)
        assert again["prediction"]["step_seconds"] == pytest.approx(one["step_seconds"])
        assert again["memory_per_rank_bytes"] == one["memory_per_rank_bytes"]


def test_what_does_not_work_is_counted_by_reason() -> None:
    recipe = load_recipe(BASE, ["mesh.dp=8", "training.micro_batch=2"])
    reasons = make_plan(recipe, dataclasses.replace(FOUR, devices_per_node=8))["refused"]
    assert any("model.num_heads = 4 / mesh.tp = 8" in reason for reason in reasons)
    small = dataclasses.replace(FOUR, memory_gb=2.0)  # CUDA alone takes as much
    nothing = make_plan(load_recipe(BASE, ["mesh.dp=4", "training.micro_batch=4"]), small)
    assert nothing["candidates"] == []
    assert any("more memory than the 2 GB of a device: ZeRO 1" in reason for reason in nothing["refused"])
    assert "0 ways fit" in render_plan(nothing)


def test_a_plan_without_a_cluster_is_this_machines() -> None:
    plan = make_plan(load_recipe(BASE))
    assert "candidates" not in plan
    assert plan["prediction"]["step_seconds"] > 0
    kept, one = plan["disk"]["checkpoints_kept"], plan["disk"]["checkpoint_bytes"]
    assert plan["disk"]["checkpoints_bytes"] == (kept + 1) * one
    assert one == 12 * plan["parameters"]["total"]
    assert "a prediction: nothing was run" in render_plan(plan)


def test_data_disk_is_the_sources_tokens() -> None:
    disk = make_plan(load_recipe("125m-c4"))["disk"]
    assert disk["data_bytes"] == 2 * disk["data_tokens"] == 2 * 2_500_000_000


def test_the_command_prints_the_table_and_what_to_set() -> None:
    options = ["--device", "h200", "--nodes", "2", "--devices", "2", "--inter-gbps", "12.5"]
    shown = CliRunner().invoke(
        app, ["plan", BASE, "--set", "mesh.dp=4", "--set", "training.micro_batch=4", *options]
    )
    assert shown.exit_code == 0
    assert "2 node(s) x 2 x H200 141GB" in shown.output
    assert "to run it: --set mesh.dp=" in shown.output


def test_options_change_a_known_device() -> None:
    assert cluster_from() is None
    found = cluster_from(device="A100", nodes=4, devices_per_node=8, tflops=200.0, memory_gb=None)
    assert found == dataclasses.replace(DEVICES["a100"], nodes=4, devices_per_node=8, tflops=200.0)
    assert cluster_from(nodes=2) == dataclasses.replace(DEVICES["h100"], nodes=2)


@pytest.mark.parametrize(
    "text, words",
    [
        ('device = "h100"\nspeed = 3', "unknown key speed"),
        ("nodes = 2", "inter_gbps is missing"),
        ('device = "h100"\nefficiency = 0.0', "efficiency = 0.0"),
        ("nodes = ", "not valid TOML"),
        ('device = "z80"', "--device z80: use one of h100"),
    ],
)
def test_a_clusters_file_is_refused_with_the_reason(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        cluster_from(file=path)
    assert len(str(caught.value).splitlines()) == 1
    path.write_text('device = "h100"\nnodes = 3')
    assert cluster_from(file=path, nodes=5) == dataclasses.replace(DEVICES["h100"], nodes=5)
    with pytest.raises(FileNotFoundError):
        cluster_from(file=tmp_path / "none.toml")
    with pytest.raises(ValueError, match="give one of them"):
        cluster_from(file=path, device="h100")


TRACES = read_json(RESULTS / "sequence_parallel.json")["cases"]


@pytest.mark.parametrize("name", [name for name in TRACES if name.startswith("wavefront/")])
def test_waits_are_those_of_the_simulation_and_of_real_ranks(name: str) -> None:
    case = TRACES[name]
    stages = case["stages_s"]
    seconds = case["gradients_s"] + wavefront_seconds(
        layers=case["layers"],
        layer=sum(stages.values()),
        scans=stages["scan"] + stages["scan_back"],
        sp=case["sp"],
        micro_batches=case["micro_batches"],
        forwards_first=case["forwards_first"],
        tied=False,
    )
    assert seconds == pytest.approx(case["predicted"], rel=0.003)
    assert seconds == pytest.approx(case["step_s"]["median"], rel=0.05)


def parts(*overrides: str, cluster: Cluster = FOUR) -> dict[str, float]:
    recipe = load_recipe(BASE, ["training.micro_batch=1", "data.chunk_aligned=true", *overrides])
    found = predict(recipe, cluster, counts=parameter_counts(recipe.model), mesh=recipe.mesh)
    return dataclasses.asdict(found) | {"total": found.total}


def test_parts_of_a_step_follow_mesh_and_engine() -> None:
    alone = parts("mesh.dp=1", "training.engine=local")
    assert alone["waiting"] == alone["tensor"] == alone["exchange"] == alone["reduction"] == 0
    segments = ("mesh.dp=1", "mesh.sp=4", "training.engine=local")
    passing = parts(*segments)
    together = parts(*segments, "training.forwards_first=4")
    assert passing["waiting"] == pytest.approx(4 * together["waiting"])
    tied = parts("mesh.dp=1", "mesh.sp=4", "training.zero_stage=3")
    assert tied["waiting"] == pytest.approx(6 * passing["waiting"])  # in every layer
    exchanged = parts(*segments, "sequence.mode=all_to_all")
    assert exchanged["waiting"] == 0
    assert exchanged["exchange"] > 0
    assert parts("mesh.dp=2", "mesh.tp=2")["tensor"] > 0
    near, far = (parts("mesh.dp=4", cluster=dataclasses.replace(FOUR, devices_per_node=n)) for n in (4, 1))
    assert far["reduction"] > 3 * near["reduction"] > 0


def test_the_record_of_real_steps_is_what_the_model_predicts() -> None:
    from benchmarks.plan_memory import case_recipe
    from benchmarks.plan_time import CASES, RESULT, predicted

    record = read_json(RESULT)
    assert set(record["cases"]) == set(CASES)
    for name, case in record["cases"].items():
        cluster = dataclasses.replace(CPU_CORE, devices_per_node=2, tflops=case["tflops"])
        seconds = predicted(case_recipe(name), cluster)
        assert seconds == pytest.approx(case["predicted_step_seconds"])
        assert 0.5 < seconds / case["step_seconds"]["median"] < 2
