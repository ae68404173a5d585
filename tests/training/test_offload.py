"""Optimizer state in host memory: the same training, the same checkpoints, the same skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.state import CheckpointReader
from tests.distributed import gloo_pool
from tests.training.engine_cases import (
    ADAM,
    STEPS,
    Curve,
    assemble,
    assert_close,
    build,
    curve_case,
    gradients_case,
    load_case,
    resume_case,
    skip_case,
    train,
)
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.engines.factory import check_engine

ENGINES = ["local", "zero1", "zero2", "zero3", "fsdp2"]


@pytest.fixture(scope="module")
def alone() -> Curve:
    """One process that keeps its state beside its weights."""
    return train(build("local", ADAM), range(STEPS), micro_batch=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_offload_does_not_change_training(engine: str, micro_batch: int, alone: Curve):
    for curve in gloo_pool(2).run(curve_case, f"{engine} offload", ADAM, micro_batch, 0.02):
        assert_close(curve, alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_offload_of_bf16(engine: str):
    expected = train(build("local bf16", ADAM), range(STEPS), micro_batch=1)
    for curve in gloo_pool(2).run(curve_case, f"{engine} bf16 offload", ADAM, 1, 0.02):
        assert_close(curve, expected, loss=2**-9, norm=2**-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_inspector_sees_the_gradient(engine: str):
    expected = assemble([gradients_case("local")])
    found = assemble(gloo_pool(2).run(gradients_case, f"{engine} offload"))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_offloaded_run_resumes_bit_for_bit_and_opens_without(engine: str, tmp_path: Path, alone: Curve):
    assert gloo_pool(2).run(resume_case, f"{engine} offload", tmp_path) == [True, True]
    assert_close(load_case("local", tmp_path / "step-00000005"), alone[5:])


@pytest.mark.parametrize("engine", [*ENGINES, "zero1 bf16", "zero2 bf16", "zero3 bf16"])
@pytest.mark.parametrize("poison, where", [(float("inf"), "loss"), (float("nan"), "gradient")])
def test_a_non_finite_step_is_skipped_on_every_rank(engine: str, poison: float, where: str):
    assert gloo_pool(2).run(skip_case, f"{engine} offload", poison, where) == [(False, True, True)] * 2


def test_the_local_engines_masters_are_not_its_weights(tmp_path: Path):
    """On a CPU too, so that what a GPU does is tested."""
    engine = build("local offload", ADAM)
    train(engine, range(1), micro_batch=1)
    state = engine._optimized()[1]
    weights = list(engine.model.parameters())
    assert all(
        torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(state, weights, strict=True)
    )
    assert all(p.grad is None for p in weights)
    assert resume_case("local offload", tmp_path)
    assert "master/hidden" not in CheckpointReader(tmp_path / "step-00000005").names()


def test_stage_0_divides_nothing_that_could_be_offloaded():
    training = TrainingConfig(
        steps=1, global_batch_tokens=1, zero_stage=0, precision="fp32", offload_optimizer=True
    )
    with pytest.raises(ValueError, match=r"offload_optimizer = true.* use training\.zero_stage = 1, 2 or 3"):
        check_engine(training)
