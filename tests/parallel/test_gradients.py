"""Gradients over the mesh: what is summed over which ranks, and a norm that counts each parameter once."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.cases import ranks
from trellis_dist.models.parallel_kind import ParallelKind, declare
from trellis_dist.parallel import gradients as gradients_module
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.gradients import (
    gradient_norm,
    partial_over_tensor,
    sum_replica_gradients,
    sum_sequence_gradients,
    sum_tensor_gradients,
)
from trellis_dist.parallel.mesh import Mesh, build_mesh


@functools.cache
def mesh_of(dp: int, sp: int, tp: int) -> Mesh:
    return build_mesh(MeshConfig(dp=dp, sp=sp, tp=tp))


def parameter(kind: ParallelKind, size: int = 3) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(size))
    made.tensor_model_parallel = kind is ParallelKind.SHARDED
    return declare(made, kind, dim=0 if kind is ParallelKind.SHARDED else None)


@pytest.mark.parametrize(
    "kind, alone, tensor, megatron",
    [
        (ParallelKind.SHARDED, False, False, False),
        (ParallelKind.REPLICATED, False, False, True),
        (ParallelKind.REPLICATED_PARTIAL, False, True, True),
    ],
)
def test_which_gradients_are_partial_over_tp(kind: ParallelKind, alone: bool, tensor: bool, megatron: bool):
    meshes = Mesh(), Mesh(tp=2), Mesh(tp=2, sequence_parallel=True)
    assert [partial_over_tensor(parameter(kind), mesh) for mesh in meshes] == [alone, tensor, megatron]


def test_the_norm_on_one_rank_is_that_of_all_elements():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), ())]
    pairs = [(nn.Parameter(torch.zeros_like(part)), part) for part in parts]
    expected = torch.cat([part.flatten() for part in parts]).double().norm()
    assert gradient_norm(pairs, Mesh()) == pytest.approx(float(expected), rel=1e-6)
    assert gradient_norm([], Mesh()) == 0.0


def sums_case() -> tuple[list[float], list[float], list[float]]:
    """Gradients of value 2^rank, in buckets of two and three elements, summed over each group."""
    mesh, results = mesh_of(2, 2, 1), []
    for add in (sum_sequence_gradients, sum_replica_gradients):
        made = [torch.full((size,), 2.0**mesh.rank) for size in (2, 3, 1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradients_module, "_BUCKET_ELEMENTS", 4)
            add(made, mesh)
        results.append(torch.cat(made).tolist())
    return results[0], results[1], tensor_sums(mesh_of(2, 1, 2))


def tensor_sums(mesh: Mesh) -> list[float]:
    kinds = (ParallelKind.SHARDED, ParallelKind.REPLICATED, ParallelKind.REPLICATED_PARTIAL)
    pairs = [(parameter(kind), torch.full((3,), 2.0**mesh.rank)) for kind in kinds]
    sum_tensor_gradients(pairs, mesh)
    return [float(gradient[0]) for _, gradient in pairs]


def test_each_sum_runs_over_its_group():
    for rank, (sequence, replica, tensor) in enumerate(ranks().run(sums_case)):
        own, pair = 2.0**rank, 3.0 if rank < 2 else 12.0
        assert sequence == [pair] * 6
        assert replica == [15.0] * 6
        assert tensor == [own, own, pair]


def norm_case(tagged: bool, spoiled: bool) -> float:
    """A sharded parameter of 1s on tp rank 0 and 2s on rank 1, and a whole one of 3s."""
    mesh = mesh_of(2, 1, 2)
    sharded, whole = parameter(ParallelKind.SHARDED), parameter(ParallelKind.REPLICATED)
    sharded.tensor_model_parallel = tagged
    pairs: list[tuple[Tensor, Tensor]] = [
        (sharded, torch.full((3,), 1.0 + mesh.tp_rank)),
        (whole, torch.full((3,), float("nan") if spoiled and mesh.rank == 3 else 3.0)),
    ]
    return gradient_norm(pairs, mesh)


def test_the_norm_counts_each_parameter_once_on_every_rank():
    expected = (3 * (1 + 4) + 3 * 9) ** 0.5
    assert ranks().run(norm_case, True, False) == pytest.approx([expected] * 4)
    assert ranks().run(norm_case, False, False) != pytest.approx([expected] * 4)


def test_a_gradient_that_is_not_finite_on_one_tp_rank_is_seen_by_its_peers():
    assert [norm != norm for norm in ranks().run(norm_case, True, True)] == [False, False, True, True]


def shards_case() -> float:
    """The same gradient, each rank along dp holding its own half of it."""
    mesh = mesh_of(2, 2, 1)
    return gradient_norm(
        [(nn.Parameter(torch.zeros(1)), torch.tensor([3.0 + mesh.dp_rank]))], mesh, shards=mesh.dp_group
    )


def test_the_norm_of_sharded_gradients():
    assert ranks().run(shards_case) == pytest.approx([5.0] * 4)
