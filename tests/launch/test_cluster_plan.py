"""A plan for a cluster: its numbers, the ways that are ranked, the times that are predicted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from launch.fit import fit_mesh
from launch.planning.cluster import CPU_CORE, DEVICES, Cluster, cluster_from
from launch.planning.plan import make_plan, render_plan
from launch.planning.step_time import predict, wavefront_seconds
from launch.preflight import checkpoint_bytes
from launch.recipe import load_recipe
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
    assert steps == pytest.approx(sorted(steps), rel=1e-3)
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


@pytest.mark.parametrize("reference", ["350m-c4+meshes/tp2", "350m-c4+meshes/sp8+contexts/16k"])
def test_the_settings_undo_what_a_shipped_mesh_set(reference: str) -> None:
    eight = dataclasses.replace(FOUR, devices_per_node=8)
    one_of_each = {
        tuple(one["mesh"].values()): one for one in make_plan(load_recipe(reference), eight)["candidates"]
    }
    assert len(one_of_each) >= 8
    for mesh, one in one_of_each.items():
        again = load_recipe(reference, one["set"])
        fit_mesh(again, world_size=8)
        assert again.tensor.sequence_parallel == (mesh[2] > 1)


def test_devices_that_do_not_divide_the_rows_are_left_out(plan: dict[str, Any]) -> None:
    twelve = dataclasses.replace(FOUR, nodes=3)
    plan = make_plan(load_recipe(BASE), twelve)  # 16 rows
    assert {one["devices"] for one in plan["candidates"]} == {8}
    assert "no way uses all 12 devices: these use 8 of 12" in render_plan(plan)
    assert plan["own_mesh"] == {"cuda": True, "devices": 12, "devices_used": 2, "fits": True, "problem": None}
    assert "2 of 12 device(s); fits" in render_plan(plan)


def test_no_tensor_group_lies_on_two_nodes() -> None:
    two_of_six = dataclasses.replace(FOUR, nodes=2, devices_per_node=6)
    assert two_of_six.holds_groups(2, ranks=12)
    assert two_of_six.holds_groups(4, ranks=4)
    assert not two_of_six.holds_groups(4, ranks=12)
    assert two_of_six.link(4, ranks=12) == two_of_six.link(12, ranks=12) != two_of_six.link(3, ranks=12)
    recipe = load_recipe(
        BASE, ["training.global_batch_tokens=12288", "model.num_heads=8", "training.micro_batch=1"]
    )
    meshes = [one["mesh"] for one in make_plan(recipe, two_of_six)["candidates"]]
    assert 3 in {mesh["dp"] for mesh in meshes}
    assert {mesh["tp"] for mesh in meshes} == {1, 2}  # and not 4, which 12 devices, 24 rows and 8 heads allow


def test_a_mesh_that_its_devices_cannot_run_is_said_to() -> None:
    wide = make_plan(load_recipe(BASE, ["mesh.dp=8", "training.micro_batch=2"]), FOUR)
    assert wide["prediction"] is None
    assert "cannot run: the mesh needs 8 devices of 4" in render_plan(wide)
    large = make_plan(
        load_recipe(BASE, ["mesh.dp=4", "training.micro_batch=4"]), dataclasses.replace(FOUR, memory_gb=2.1)
    )
    assert large["own_mesh"]["fits"] is False
    assert "does not fit, by this estimate: a rank takes" in render_plan(large)
    unknown = make_plan(load_recipe(BASE, ["mesh.dp=2"]), dataclasses.replace(CPU_CORE, devices_per_node=2))
    shown = render_plan(unknown)
    assert unknown["own_mesh"]["fits"] is None
    assert "2 of 2 device(s); whether it fits is not checked" in shown
    assert "ways work if they fit, which is not checked" in shown
    assert "0 GB each" not in shown


def test_segments_that_collectives_tie_are_marked(plan: dict[str, Any]) -> None:
    for one in plan["candidates"]:
        divides = one["engine"] == "deepspeed" and one["zero_stage"] >= 2
        assert one["tied"] == (divides and one["mesh"]["sp"] > 1)
    tied = make_plan(load_recipe(BASE, [*SEGMENTS, "training.zero_stage=2", "training.micro_batch=1"]), FOUR)
    assert tied["prediction"]["tied"]
    assert "tied: exact, but collectives make segments wait" in render_plan(tied).split("ways to run")[0]


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
    half = make_plan(load_recipe(BASE, ["training.precision=bf16"]))  # no GPU here: computed in fp32
    if not torch.cuda.is_available():
        assert half["memory_per_rank_bytes"] == plan["memory_per_rank_bytes"]
        assert "fp32 (as a CPU computes, for bf16)" in render_plan(half)
    assert plan["prediction"]["step_seconds"] > 0
    kept, one = plan["disk"]["checkpoints_kept"], plan["disk"]["checkpoint_bytes"]
    assert plan["disk"]["checkpoints_bytes"] == (kept + 1) * one
    assert one == 12 * plan["parameters"]["total"]
    assert "a prediction: nothing was run" in render_plan(plan)


@pytest.mark.parametrize(
    "settings, per",
    [
        (["training.precision=bf16"], 14),
        (["training.precision=bf16", "training.engine=fsdp2"], 12),
        (["optimizer.kind=sgd", "training.engine=local"], 4),
    ],
)
def test_a_checkpoint_is_what_the_ranks_write(settings: list[str], per: int) -> None:
    recipe = load_recipe(BASE, settings)
    assert checkpoint_bytes(recipe) == per * parameter_counts(recipe.model).total


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
        ('device = "h100"\ntflops = "989"', "tflops = '989': use a finite number"),
        ('device = "h100"\nnodes = 2.5', "nodes = 2.5: use a whole number"),
        ('device = "h100"\nnodes = true', "nodes = True: use a whole number"),
        ('device = "h100"\ncuda = "no"', "cuda = 'no': use true or false"),
        ('device = "h100"\nmemory_gb = inf', "memory_gb = inf: use a finite number"),
        ('device = "h100"\nintra_latency_us = -1', "intra_latency_us = -1: use 0 or more"),
    ],
)
def test_a_clusters_file_is_refused_with_the_reason(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        cluster_from(file=path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)
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
    )
    assert seconds == pytest.approx(case["predicted"], rel=0.003)
    assert seconds == pytest.approx(case["step_s"]["median"], rel=0.05)


SEGMENTS = ("mesh.dp=1", "mesh.sp=4", "data.chunk_aligned=true")


def parts(*overrides: str, cluster: Cluster = FOUR, base: str = BASE) -> dict[str, float]:
    recipe = load_recipe(base, ["training.micro_batch=1", "data.chunk_aligned=true", *overrides])
    found = predict(recipe, cluster, counts=parameter_counts(recipe.model), mesh=recipe.mesh)
    return dataclasses.asdict(found) | {"total": found.total}


def test_parts_of_a_step_follow_mesh_and_engine() -> None:
    alone = parts("mesh.dp=1", "training.engine=local")
    assert alone["waiting"] == alone["tensor"] == alone["exchange"] == alone["reduction"] == 0
    segments = ("mesh.dp=1", "mesh.sp=4", "training.engine=local")
    passing = parts(*segments)
    model, hops = load_recipe(BASE).model, 16 * 3 * 2  # micro-batches, neighbours, there and back
    states = 2 * model.trellis.slots * model.dim * 4  # of the one row
    slow = parts(*segments, cluster=dataclasses.replace(FOUR, intra_gbps=1.0))
    assert slow["waiting"] - passing["waiting"] == pytest.approx(hops * states * (1 / 1e9 - 1 / 450e9))
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


def test_attention_layers_tie_segments_and_move_no_slots() -> None:
    hybrid = ("model.num_layers=8", 'model.pattern=["trellis", "trellis", "attention"]')
    segments = (*SEGMENTS, "training.engine=local")
    tied, passing = parts(*segments, *hybrid), parts(*segments)
    assert tied["waiting"] == pytest.approx(3 * passing["waiting"])
    together = parts(*segments, *hybrid, "training.forwards_first=4")
    assert together["waiting"] == pytest.approx(tied["waiting"])
    slots = parts(*segments, *hybrid, "model.trellis.slots=64")
    assert slots["exchange"] == pytest.approx(tied["exchange"])
    assert tied["exchange"] > 0
    divided = parts(*SEGMENTS, *hybrid, "training.zero_stage=3")
    assert divided["waiting"] == pytest.approx(6 * passing["waiting"])


@pytest.mark.parametrize(
    "settings, passes",
    [  # trips of a ring times bytes of a parameter, in a step of 4 micro-batches (ZeRO 0 trains no bf16)
        (["training.engine=local"], 2 * 4),
        (["training.zero_stage=1"], 2 * 2 + 2),
        (["training.zero_stage=2"], 4 * 2 * 2 + 2),
        (["training.zero_stage=3"], 4 * (2 + 2)),
        (["training.zero_stage=3", "mesh.dp=2", "mesh.sp=2", "training.micro_batch=2"], 4 * (2 * 2 + 2)),
        (["training.zero_stage=1", "training.precision=fp32"], 2 * 4 + 4),
    ],
)
def test_gradients_travel_as_wide_and_as_often_as_the_engines_send_them(
    settings: list[str], passes: int
) -> None:
    slow = dataclasses.replace(FOUR, intra_gbps=1.0, intra_latency_us=0.0)
    found = parts("mesh.dp=4", "training.precision=bf16", *settings, cluster=slow)
    parameters = parameter_counts(load_recipe(BASE).model).total
    assert found["reduction"] == pytest.approx(passes * parameters * 3 / 4 / 1e9)


def test_fp32_takes_a_gpus_fp32_units_and_offload_the_hosts_memory() -> None:
    large = ("mesh.dp=1", "training.engine=local", "training.micro_batch=8")
    half, wide = (parts(*large, f"training.precision={it}", base="125m-c4") for it in ("bf16", "fp32"))
    assert wide["layers"] > 4 * half["layers"]
    unknown = dataclasses.replace(FOUR, tflops_fp32=0.0)
    assert (
        parts(*large, "training.precision=fp32", base="125m-c4", cluster=unknown)["layers"] < wide["layers"]
    )
    shown = make_plan(load_recipe(BASE), FOUR)
    assert "66.9 TFLOP/s a device in fp32; matrix products" in render_plan(shown)
    shown = make_plan(load_recipe(BASE), unknown)
    assert "989 TFLOP/s a device in fp32 (of bf16: tflops_fp32 is not given)" in render_plan(shown)
    near = parts("mesh.dp=4", "training.precision=bf16")
    far = parts("mesh.dp=4", "training.precision=bf16", "training.offload_optimizer=true")
    assert far["update"] == pytest.approx(
        near["update"] * (32 + 4 + 2) / 32 * FOUR.memory_gbps / FOUR.host_gbps
    )


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
