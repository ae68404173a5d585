"""Compiled blocks: the eager bits, few graphs, transfers between them, and recomputation around them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from tests.distributed import gloo_pool
from tests.largest import largest
from tests.parallel.cases import relative
from tests.parallel.test_model import TINY
from tests.parallel.test_recompute import (
    COMMUNICATION,
    HYBRID,
    batches,
    make,
    recomputing,
    run,
    same,
    watched,
)
from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.conv import causal_conv
from trellis_dist.parallel.compile import apply_compile
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.transfers import Transfers

BASELINES = replace(
    TINY,
    pattern=("gated_deltanet", "mamba2"),
    baselines=BaselineConfig(chunk_size=8),
)
EVERY_MODE = ("none", "selective", "full")
# Before a case counts as hanging: compiling takes its time on a busy machine.
COMPILING_S = 120.0


class Graphs:
    """The backend aot_eager; keeps the graphs and which of them ran, in a recomputation or not."""

    def __init__(self) -> None:
        self.captured: list[torch.fx.GraphModule] = []
        self.runs: list[tuple[int, bool]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        index = len(self.captured)
        self.captured.append(graph)
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def call(*args: Any) -> Any:
            self.runs.append((index, recomputing()))
            return compiled(*args)

        return call


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(config: ModelConfig, mesh: Mesh, mode: str) -> tuple[Any, Any, Graphs]:
    model, segments = make(config, mesh, mode)
    graphs = Graphs()
    apply_compile(model, backend=graphs)
    return model, segments, graphs


def again(model: Any, segments: Any, micro: list[Any]) -> list[Tensor]:
    model.zero_grad()
    return run(model, segments, micro)


@pytest.mark.parametrize(
    ("config", "mode", "reasons"),
    [
        (TINY, "none", set()),
        (TINY, "selective", {"recomputation is eager"}),
        (TINY, "full", set()),
        (HYBRID, "none", {"goes document by document"}),
        (BASELINES, "none", {"goes chunk by chunk"}),
        (BASELINES, "full", {"goes chunk by chunk"}),
    ],
    ids=["none", "selective", "full", "hybrid", "baselines", "baselines-full"],
)
def test_one_process_computes_the_same_bits(config: ModelConfig, mode: str, reasons: set[str]):
    """Two steps of two micro-batches each; the packings of the second step are new."""
    counters.clear()
    micro = batches(Mesh(), 4, packed=True)
    eager, segments = make(config, Mesh(), "none")
    expected = [run(eager, segments, micro[:2]), again(eager, segments, micro[2:])]
    model, segments, graphs = compiled(config, Mesh(), mode)
    assert same(run(model, segments, micro[:2]), expected[0])
    first = len(graphs.captured)
    assert same(again(model, segments, micro[2:]), expected[1])
    assert len(graphs.captured) == first
    assert breaks() == reasons


def breaks() -> set[str]:
    """Why graphs ended: the reasons that ``compile`` gives, or all of what dynamo says."""
    reasons = (
        "recomputation is eager",
        "communicates",
        "goes document by document",
        "goes chunk by chunk",
    )
    keys = counters["graph_break"]
    said = {key: [reason for reason in reasons if f"reason: {reason}" in key] for key in keys}
    return {found[0] if found else key for key, found in said.items()}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_layers_share_their_graphs(split: bool):
    """Split as by sequence parallelism: every layer calls another object, outside of its graphs."""
    micro, found = batches(Mesh(), 2, packed=True), []
    for layers in (2, 9):  # more than dynamo compiles one function for
        torch._dynamo.reset()
        model, segments = make(replace(TINY, num_layers=layers), Mesh(), "none")
        for block in model.blocks:
            if split:
                block.mixer.convolution = functools.partial(causal_conv)
        graphs = Graphs()
        apply_compile(model, backend=graphs)
        run(model, segments, micro)
        found.append(len(graphs.captured))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_recomputation_runs_the_graphs_of_its_forward_pass(mode: str):
    """The first packing is compiled for its sizes, the second for any: then both would do for the first."""
    model, segments, graphs = compiled(TINY, Mesh(), mode)
    first, second = batches(Mesh(), 2, packed=True)
    forward = []
    for batch in (first, second):
        tokens, labels, bounds = segments.cut(*batch)
        forward.append(model.loss_sum(tokens, labels, cu_seqlens=bounds))
        forward.append({index for index, _ in graphs.runs})
        graphs.runs.clear()
    assert forward[1] != forward[3]
    for loss, ran in (forward[:2], forward[2:]):
        graphs.runs.clear()
        loss.backward()
        recomputed = {index for index, again in graphs.runs if again}
        assert recomputed
        assert recomputed <= ran


def over_the_sequence(mode: str) -> dict[str, Any]:
    """Two steps with state passing: differences to eager, graphs, and transfers made outside of graphs."""
    torch._dynamo.reset()
    counters.clear()
    mesh = build_mesh(MeshConfig(sp=2))
    micro, outside = batches(mesh, 4, packed=True), []
    eager, segments = make(TINY, mesh, "none")
    expected = [run(eager, segments, micro[:2]), again(eager, segments, micro[2:])]
    model, segments, graphs = compiled(TINY, mesh, mode)
    expect_left = Transfers.expect_left

    def noted(self: Transfers, *like: Tensor) -> Any:
        outside.append(not torch.compiler.is_compiling() and type(like[0]) is Tensor)
        return expect_left(self, *like)

    with watched(*COMMUNICATION) as counts, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfers, "expect_left", noted)
        ours = [run(model, segments, micro[:2])]
        first = len(graphs.captured)
        ours.append(again(model, segments, micro[2:]))
    dist.barrier()
    pairs = [pair for step in zip(ours, expected, strict=True) for pair in zip(*step, strict=True)]
    return {
        "difference": largest(relative(a, b) for a, b in pairs),
        "later graphs": len(graphs.captured) - first,
        "breaks": breaks(),
        "transfers": (len(outside), all(outside)),
        **counts,
    }


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_segments_transfer_between_graphs_and_replay_in_recomputation(mode: str):
    calls = 4 * TINY.num_layers  # four micro-batches, in each layer a halo and a pair of memories
    expected_calls = {"none": 2 * calls, "selective": 3 * calls, "full": 4 * calls}[mode]
    reasons = {"communicates"}
    if mode == "selective":
        reasons.add("recomputation is eager")
    for found in gloo_pool(2).run(over_the_sequence, mode, timeout_s=COMPILING_S):
        assert found["difference"] <= 1e-6
        assert found["later graphs"] == 0, "another packing of as many tokens is no other graph"
        assert found["breaks"] == reasons
        assert found["transfers"] == (expected_calls, True)
        assert [found[name] for name in COMMUNICATION] == [0, 0, 0]


def over_other_axes(axis: str) -> float:
    """Largest difference to eager, in fp64; full recomputation."""
    torch._dynamo.reset()
    if axis == "all-to-all":
        mesh = build_mesh(MeshConfig(sp=2), sequence=SequenceConfig(mode="all_to_all"))
        config = replace(HYBRID, num_layers=2)
    else:
        mesh = build_mesh(MeshConfig(tp=2), tensor=TensorConfig(sequence_parallel=True))
        config = replace(TINY, num_layers=1)
    micro = batches(mesh, 1, packed=True)
    eager, segments = make(config, mesh, "none")
    expected = run(eager.double(), segments, micro)
    model, segments, _ = compiled(config, mesh, "full")
    ours = run(model.double(), segments, micro)
    dist.barrier()
    return largest(relative(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("axis", ["all-to-all", "tensor"])
def test_other_axes_communicate_between_graphs(axis: str):
    assert largest(gloo_pool(2).run(over_other_axes, axis, timeout_s=COMPILING_S)) < 1e-12


def test_inductor_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    model, _ = make(TINY, Mesh(), "none")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler: install g\+\+.*aot_eager") as refusal:
        apply_compile(model, backend="inductor")
    assert "\n" not in str(refusal.value)


def test_none_compiles_nothing():
    model, _ = make(TINY, Mesh(), "none")
    before = model.blocks[0].whole
    apply_compile(model, backend="none")
    assert model.blocks[0].whole is before
