"""Meshes that cannot work are refused with the arithmetic; those that can place every rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from tests.parallel.cases import mesh_of, ranks
from trellis_dist.parallel import cuda_absent, env
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.parallel.mesh import build_mesh, check_mesh

FITS = {
    "world_size": 4,
    "sequence_length": 128,
    "chunk_size": 16,
    "num_heads": 4,
    "vocab_size": 100,
    "global_rows": 8,
    "micro_batch": 2,
    "conv_kernel": 4,
}


@pytest.mark.parametrize(("sp", "dp"), [(1, 4), (2, 2), (4, 1)])
def test_dp_takes_what_the_world_size_leaves(sp: int, dp: int):
    assert check_mesh(MeshConfig(sp=sp), **FITS) == MeshConfig(dp=dp, sp=sp)
    assert check_mesh(MeshConfig(dp=dp, sp=sp), **FITS) == MeshConfig(dp=dp, sp=sp)


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        ({"sp": 3}, {}, r"world size 4 does not divide by mesh.sp \* mesh.tp = 3 \* 1 = 3"),
        ({"sp": 8}, {}, "start a multiple of 8 ranks"),
        ({"dp": 3}, {}, r"mesh.dp \* mesh.sp \* mesh.tp = 3 \* 1 \* 1 = 3, but the world size is 4"),
        ({"sp": 2}, {"sequence_length": 120}, r"120 / mesh.sp 2 = 60 .* multiple of the chunk size 16.*128"),
        ({"sp": 4}, {"sequence_length": 8, "chunk_size": 1}, "2 tokens per segment, fewer than the 3"),
        ({}, {"global_rows": 12}, "12 rows = micro_batch 2 x accumulation 1.5 x dp 4.*multiple of 8 rows"),
        ({}, {"global_rows": 4}, "accumulation 0.5"),
        ({"tp": 3}, {}, r"model.num_heads = 4 / mesh.tp = 3 = 1.33333 heads per rank"),
        ({"tp": 2}, {"vocab_size": 99}, r"vocab_size = 99 / mesh.tp = 2 = 49.5 .*model.vocab_size = 100"),
        ({"tp": 2}, {"mlp_hidden": 33}, r"width 33 / mesh.tp = 2 = 16.5 .*model.mlp_hidden = 34"),
        (
            {"sp": 2, "tp": 2},
            {"pattern": ("trellis", "attention"), "num_heads": 2},
            r"softmax attention with mesh.sp = 2 .* 2 / tp 2 = 1 heads .* 1 / 2 = 0.5 is no whole number",
        ),
        (
            {"sp": 4},
            {"sequence": SequenceConfig(mode="all_to_all"), "num_heads": 2},
            r'sequence.mode = "all_to_all" with mesh.sp = 4 .* 2 / 4 = 0.5 is no whole number',
        ),
        ({}, {"tensor": TensorConfig(sequence_parallel=True)}, r"splits tokens over tp, and mesh.tp = 1"),
        (
            {"tp": 4},
            {"tensor": TensorConfig(sequence_parallel=True), "sequence_length": 126},
            r"the 126 tokens of a row or segment over mesh.tp = 4: 126 / 4 = 31.5 is no whole number",
        ),
    ],
)
def test_a_mesh_that_cannot_work_is_refused_with_the_arithmetic(mesh: dict, change: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        check_mesh(MeshConfig(**mesh), **{**FITS, **change})
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()


def test_sp_1_takes_rows_that_end_inside_a_chunk():
    assert check_mesh(MeshConfig(), **{**FITS, "sequence_length": 121}).dp == 4


@pytest.mark.parametrize("axis", ["dp", "sp", "tp"])
def test_an_axis_below_one_is_refused(axis: str):
    with pytest.raises(ValueError, match=f"mesh.{axis} = 0"):
        MeshConfig(**{axis: 0})


def test_a_single_process_needs_no_group_and_no_megatron():
    program = (
        "import sys, torch\n"
        "from trellis_dist.parallel import apply, env\n"
        "from trellis_dist.parallel.config import MeshConfig\n"
        "from trellis_dist.parallel.mesh import build_mesh\n"
        "env.init_distributed('cpu')\n"
        "mesh = build_mesh(MeshConfig())\n"
        "assert (mesh.world_size, mesh.rank) == (1, 0)\n"
        "assert mesh.left is mesh.right is mesh.sp_group is None\n"
        "assert env.sum_scalar(2.5) == 2.5 and env.agree(True) and not env.agree(False)\n"
        "assert env.broadcast_object({'a': 1}) == {'a': 1} and env.is_main()\n"
        "env.shutdown()\n"
        "assert not torch.distributed.is_initialized() and 'megatron' not in sys.modules\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_half_a_torchrun_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="WORLD_SIZE, MASTER_ADDR is not: start the job with torchrun"):
        env.init_distributed("cpu")


def test_a_mesh_of_more_ranks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="world size 1"):
        build_mesh(MeshConfig(sp=2))


def places(sp: int) -> dict:
    mesh = mesh_of(sp)
    groups = (mesh.sp_group, mesh.rightward, mesh.leftward)
    return {
        "place": (mesh.rank, mesh.dp_rank, mesh.sp_rank, mesh.tp_rank, mesh.left, mesh.right),
        "groups": [None if group is None else dist.get_process_group_ranks(group) for group in groups],
        "apart": len({mesh.sp_group, mesh.rightward, mesh.leftward}) == 3,
    }


def test_ranks_are_placed_dp_outside_sp():
    found = ranks().run(places, 2)
    assert [place["place"] for place in found] == [
        (0, 0, 0, 0, None, 1),
        (1, 0, 1, 0, 0, None),
        (2, 1, 0, 0, None, 3),
        (3, 1, 1, 0, 2, None),
    ]
    for rank, place in enumerate(found):
        row = [0, 1] if rank < 2 else [2, 3]
        assert place["groups"] == [row, row, row]
        assert place["apart"]


def tensor_place() -> dict:
    tensor, sequence = TensorConfig(sequence_parallel=True), SequenceConfig(mode="all_to_all")
    mesh = build_mesh(MeshConfig(sp=2, tp=2), tensor=tensor, sequence=sequence)
    groups = (mesh.tp_group, mesh.sp_group, mesh.replica_group, mesh.rightward, mesh.leftward)
    return {
        "place": (mesh.dp_rank, mesh.sp_rank, mesh.tp_rank, mesh.left, mesh.right, mesh.dp_group),
        "groups": [dist.get_process_group_ranks(group) for group in groups],
        "settings": (mesh.sequence_parallel, mesh.sequence_mode),
    }


def test_tensor_ranks_are_neighbours_inside_sp():
    found = ranks().run(tensor_place)
    assert [place["place"] for place in found] == [
        (0, 0, 0, None, 2, None),
        (0, 0, 1, None, 3, None),
        (0, 1, 0, 0, None, None),
        (0, 1, 1, 1, None, None),
    ]
    for rank, place in enumerate(found):
        shards, segments = ([0, 1], [2, 3])[rank // 2], ([0, 2], [1, 3])[rank % 2]
        assert place["groups"] == [shards, segments, segments, segments, segments]
        assert place["settings"] == (True, "all_to_all")


def second_build() -> tuple[bool, bool, int]:
    """Whether the groups are the same, the other settings, and how many groups it has made."""
    first, alone = build_mesh(MeshConfig(sp=2, tp=2)), env.alone()
    before = dist.get_pg_count()
    again = build_mesh(MeshConfig(sp=2, tp=2), tensor=TensorConfig(sequence_parallel=True))
    names = ("tp_group", "sp_group", "replica_group", "rightward", "leftward")
    same = [getattr(first, name) is getattr(again, name) for name in names]
    return all([*same, alone is env.alone()]), again.sequence_parallel, dist.get_pg_count() - before


def test_a_mesh_of_the_same_shape_uses_the_groups_that_are_there():
    assert ranks().run(second_build) == [(True, True, 0)] * 4


def test_megatron_does_not_talk_to_the_user():
    pool = ranks()
    assert not any("Transformer Engine" in pool._log(rank).read_text() for rank in range(4))


def agreements() -> tuple:
    me = env.rank()
    return (
        env.sum_scalar(me + 0.5),
        env.sum_scalar(1.0, mesh_of(2).sp_group),
        env.agree(me < 4),
        env.agree(me != 2),
        env.broadcast_object([me, "id"], src=3),
        env.world_size(),
        env.is_main(),
    )


def test_numbers_flags_and_objects_are_agreed_on():
    found = ranks().run(agreements)
    assert [answer[:6] for answer in found] == [(8.0, 2.0, True, False, [3, "id"], 4)] * 4
    assert [answer[6] for answer in found] == [True, False, False, False]


def megatron_gather() -> list[float]:
    """A sequence-parallel region of megatron-core, which allocates on torch.cuda.current_device()."""
    assert cuda_absent.install()
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    x = torch.full((1, 2), float(env.rank()))
    return gather_from_sequence_parallel_region(x, group=dist.group.WORLD)[:, 0].tolist()


def test_megatron_collectives_work_where_cuda_is_absent():
    if torch.cuda.is_available():
        assert not cuda_absent.install()
        return
    assert ranks().run(megatron_gather) == [[0.0, 1.0, 2.0, 3.0]] * 4
