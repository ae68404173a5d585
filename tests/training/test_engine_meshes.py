"""Engines over dp, sp and tp: one process's gradients, shared checkpoints, skips that all ranks take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import GlooPool, gloo_pool
from tests.training.engine_cases import Curve, assemble, assert_close
from tests.training.model_cases import (
    ALONE,
    Axes,
    load_case,
    mesh_of,
    resume_case,
    run_case,
    skip_case,
)

DP_SP, DP_TP, SP = (2, 2, 1, False), (2, 1, 2, False), (1, 4, 1, False)
DP_TP_MEGATRON, SP_TP = (2, 1, 2, True), (1, 2, 2, True)
CASES: list[tuple[str, Axes]] = [
    *((engine, DP_SP) for engine in ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")),
    *((engine, DP_TP_MEGATRON) for engine in ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")),
    ("zero1", DP_TP),
    ("zero1", SP_TP),
    ("zero3", SP),
    ("fsdp2", SP),
    ("zero1 offload", DP_SP),
    ("fsdp2 offload", DP_SP),
    ("local first4", DP_SP),
    ("zero1 first4", SP),
    ("zero3 first4", DP_SP),
    ("fsdp2 first4", DP_SP),
]
LIMIT_S = 120.0  # of a case on a busy machine
_ready: set[GlooPool] = set()


def ranks() -> GlooPool:
    """Four ranks that have made their meshes, which takes longer than a case may on a busy machine."""
    pool = gloo_pool(4)
    if pool not in _ready:
        pool.run(make_meshes, timeout_s=LIMIT_S)
        _ready.add(pool)
    return pool


def make_meshes() -> None:
    for axes in (DP_SP, DP_TP, SP, DP_TP_MEGATRON, SP_TP):
        mesh_of(axes)


def run_on_ranks(case: Any, *args: Any) -> list[Any]:
    return ranks().run(case, *args, timeout_s=LIMIT_S)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Curve, list[Any], list[float]]]:
    """One process with plain torch."""
    return {optimizer: run_case("local", ALONE, optimizer) for optimizer in ("sgd", "adam")}


def assert_same(found: list[Any], expected: tuple[Curve, list[Any], list[float]]) -> None:
    """Curves and evaluation of every rank, and the whole gradient that their slices make up."""
    for curve, _, evaluation in found:
        assert_close(curve, expected[0])
        torch.testing.assert_close(torch.tensor(evaluation), torch.tensor(expected[2]), rtol=1e-5, atol=0)
    gradients, wanted = assemble([shown for _, shown, _ in found]), assemble([expected[1]])
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("engine, axes", CASES, ids=str)
def test_a_mesh_has_the_gradient_of_one_process(engine: str, axes: Axes, alone: Any):
    assert_same(run_on_ranks(run_case, engine, axes, "sgd"), alone["sgd"])


@pytest.mark.parametrize(
    "engine, axes",
    [("zero1", DP_SP), *((e, DP_TP_MEGATRON) for e in ("local", "zero0", "zero1", "zero3", "fsdp2"))],
    ids=str,
)
def test_adam_and_clipping_match_one_process(engine: str, axes: Axes, alone: Any):
    assert_same(run_on_ranks(run_case, engine, axes, "adam"), alone["adam"])


@pytest.mark.parametrize(
    "engine, axes, fault",
    [
        ("zero1", DP_TP_MEGATRON, "no sums over tp"),
        ("zero1", DP_TP, "untagged"),
        ("local", DP_TP, "untagged"),
        ("zero3", DP_SP, "reduce_scatter"),
    ],
)
def test_parity_fails_with_a_fault(engine: str, axes: Axes, fault: str, alone: Any):
    found = run_on_ranks(run_case, engine, axes, "sgd", fault)
    with pytest.raises(AssertionError):
        assert_same(found, alone["sgd"])


@pytest.mark.parametrize(
    "engine, axes, other, other_axes",
    [
        ("zero1", DP_TP_MEGATRON, "fsdp2", DP_SP),
        ("fsdp2", DP_SP, "zero3", DP_TP_MEGATRON),
        ("zero3", DP_SP, "local", SP_TP),
        ("local", DP_TP, "zero2", DP_SP),
        ("zero1 bf16", DP_TP, "zero2 bf16", DP_SP),
    ],
)
def test_a_mesh_resumes_bit_for_bit_and_opens_on_another_and_alone(
    engine: str, axes: Axes, other: str, other_axes: Axes, tmp_path: Path
):
    assert run_on_ranks(resume_case, engine, axes, tmp_path) == [True] * 4
    path = tmp_path / "step-00000002"
    precision = "local bf16" if "bf16" in engine else "local"
    expected = load_case(precision, ALONE, path)
    tolerance = {"loss": 2**-8, "norm": 2**-6} if "bf16" in engine else {}
    for curve in run_on_ranks(load_case, other, other_axes, path):
        assert_close(curve, expected, **tolerance)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize(
    "engine, axes", [(e, a) for e in ("local", "zero1", "zero3", "fsdp2") for a in (DP_SP, DP_TP)], ids=str
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(engine: str, axes: Axes, where: str):
    assert run_on_ranks(skip_case, engine, axes, where) == [(False, True, True)] * 4
