"""The first step checks the hooks that later steps rely on."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.distributed import gloo_pool
from trellis_dist.models.parallel_kind import ParallelKind, declare
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.engines.fragments import held_parameters
from trellis_dist.training.engines.hooks import GradientOrder, TensorSums


class Two(nn.Module):
    """Two parameters that every tp rank holds whole and applies to its own heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = declare(nn.Parameter(torch.ones(2)), ParallelKind.REPLICATED_PARTIAL)
        self.second = declare(nn.Parameter(torch.ones(2)), ParallelKind.REPLICATED_PARTIAL)


@functools.cache
def mesh_of(sp: int, tp: int) -> Mesh:
    return build_mesh(MeshConfig(sp=sp, tp=tp))


def sums_case(passes: int) -> tuple[list[float], str]:
    """Gradients after passes of weight rank + 1, and what ``check`` says when the last leaves one unused."""
    mesh, model = mesh_of(1, 2), Two()
    sums = TensorSums(held_parameters(model), mesh)
    for _ in range(passes):
        ((mesh.rank + 1.0) * (model.first + model.second)).sum().backward()
    model.first.sum().backward()
    gradients = [float(p.grad[0]) for p in model.parameters() if p.grad is not None]
    try:
        sums.check(passes + 1)
    except AssertionError as error:
        return gradients, str(error)
    return gradients, ""


def test_partial_gradients_are_summed_and_a_hook_that_stayed_silent_is_found():
    for gradients, complaint in gloo_pool(2).run(sums_case, 1):
        assert gradients == [3.0 + 2.0, 3.0]
        assert "partial gradients were not summed over tp 2 time(s) each: {'second': 1}" in complaint


def order_case(swapped: bool) -> str:
    mesh, model = mesh_of(2, 1), Two()
    order = GradientOrder(held_parameters(model), mesh)
    names = ["second", "first"] if swapped and mesh.rank else ["first", "second"]
    for name in names:
        getattr(model, name).sum().backward()
    try:
        order.check()
    except AssertionError as error:
        return str(error)
    model.first.sum().backward()
    return f"noted {len(order._order)}"


def test_sequence_ranks_must_make_their_gradients_in_one_order():
    assert gloo_pool(2).run(order_case, False) == ["noted 2"] * 2
    assert all("different orders" in complaint for complaint in gloo_pool(2).run(order_case, True))


def test_nothing_is_watched_on_one_rank():
    model = Two()
    TensorSums(held_parameters(model), Mesh()).check(1)
    GradientOrder(held_parameters(model), Mesh()).check()
    with pytest.raises(AssertionError, match="not summed"):
        TensorSums(held_parameters(model), Mesh(tp=2)).check(1)
