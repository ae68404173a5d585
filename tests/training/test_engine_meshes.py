"""Engines over dp, sp and tp: evaluation, shared checkpoints, skips that all ranks take.

That they train as one process does is in test_parity.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import GlooPool, gloo_pool
from tests.training.engine_cases import assert_close
from tests.training.model_cases import ALONE, Axes, evaluate_case, load_case, mesh_of, resume_case, skip_case

DP_SP, DP_TP = (2, 2, 1, False), (2, 1, 2, False)
DP_TP_MEGATRON, SP_TP = (2, 1, 2, True), (1, 2, 2, True)
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
    for axes in (DP_SP, DP_TP, SP_TP):
        mesh_of(axes)


def run_on_ranks(case: Any, *args: Any) -> list[Any]:
    return ranks().run(case, *args, timeout_s=LIMIT_S)


@pytest.mark.parametrize(
    "engine, axes",
    [
        ("local", SP_TP),
        ("zero1", DP_SP),
        ("zero1", DP_TP_MEGATRON),
        ("zero3", DP_SP),
        ("fsdp2", DP_TP_MEGATRON),
    ],
    ids=str,
)
def test_an_evaluation_is_that_of_one_process(engine: str, axes: Axes):
    (nats, tokens) = evaluate_case("local", ALONE)
    for found in run_on_ranks(evaluate_case, engine, axes):
        assert found == (pytest.approx(nats, rel=1e-5), tokens)


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
