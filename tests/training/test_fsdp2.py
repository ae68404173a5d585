"""FSDP2 trains as one process does; every rank holds its rows only; checkpoints are everybody's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints.state import CheckpointReader
from tests.distributed import gloo_pool
from tests.training.engine_cases import (
    ADAM,
    SGD,
    STEPS,
    assemble,
    assert_close,
    build,
    curve_case,
    gradients_case,
    load_case,
    local,
    resume_case,
    save,
    skip_case,
    train,
)
from tests.training.stand_in import VOCAB, WIDTH, global_rows, split
from trellis_dist.models.parallel_kind import Shard
from trellis_dist.parallel import env
from trellis_dist.training.engines import fragments
from trellis_dist.training.engines.fragments import Fragment, Held


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_two_replicas_match_one_process(micro_batch: int):
    expected = train(build("local", SGD), range(STEPS), micro_batch=4, lr=0.2)
    for curve in gloo_pool(2).run(curve_case, "fsdp2", SGD, micro_batch, 0.2):
        assert_close(curve, expected)
    mistaken = gloo_pool(2).run(curve_case, "fsdp2", SGD, micro_batch, 0.2, True)[0]
    with pytest.raises(AssertionError):
        assert_close(mistaken, expected, loss=2**-9, norm=2**-8)


def test_adam_and_clipping_match_one_process():
    expected = train(build("local", ADAM), range(STEPS), micro_batch=2)
    for engine in ("fsdp2", "fsdp2 first2"):
        for curve in gloo_pool(2).run(curve_case, engine, ADAM, 1, 0.02):
            assert_close(curve, expected)


def test_bf16_matches_the_local_engines():
    """Gathered weights are bf16, the shards fp32; gradients are reduced in fp32."""
    expected = train(build("local bf16", ADAM), range(STEPS), micro_batch=1)
    for curve in gloo_pool(2).run(curve_case, "fsdp2 bf16", ADAM, 1, 0.02):
        assert_close(curve, expected, loss=2**-9, norm=2**-8)
        assert curve != train(build("local", ADAM), range(STEPS), micro_batch=1)


def test_the_inspector_sees_the_gradient_of_the_mean():
    expected = assemble([gradients_case("local")])
    found = assemble(gloo_pool(2).run(gradients_case, "fsdp2"))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def held_case() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a rank keeps between steps, moments included."""
    engine = build("fsdp2 bf16", ADAM)
    train(engine, range(1), micro_batch=1)
    held = {name: local(p) for name, p in engine.model.named_parameters()}
    parts = {part.name: part.local for part in engine.logical_tensors()}
    assert parts["optimizer/exp_avg/hidden"].shape == held["hidden"].shape
    return {name: (tuple(value.shape), value.dtype) for name, value in held.items()}


def test_a_rank_keeps_its_rows_in_fp32():
    first, second = gloo_pool(2).run(held_case)
    assert first["embedding"] == ((-(-VOCAB // 2), WIDTH), torch.float32)
    assert second["embedding"] == ((VOCAB // 2, WIDTH), torch.float32)


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2 bf16"])
def test_replicas_resume_bit_for_bit_and_open_in_the_local_engine(engine: str, tmp_path: Path):
    assert gloo_pool(2).run(resume_case, engine, tmp_path) == [True, True]
    reader = CheckpointReader(tmp_path / "step-00000005")
    assert reader.dtype("model/hidden") == torch.float32
    assert "master/hidden" not in reader.names()
    name, tolerance = "local", {}
    if engine.endswith("bf16"):
        name, tolerance = "local bf16", {"loss": 2**-9, "norm": 2**-8}
    expected = train(build(name, ADAM), range(STEPS), micro_batch=1)[5:]
    assert_close(load_case(name, tmp_path / "step-00000005"), expected, **tolerance)


@pytest.mark.parametrize("saved, opened", [("local", "fsdp2"), ("local bf16", "fsdp2 bf16")])
def test_a_checkpoint_of_one_process_opens_on_replicas(saved: str, opened: str, tmp_path: Path):
    alone = build(saved, ADAM)
    train(alone, range(5), micro_batch=1)
    path = save(alone, tmp_path, 5)
    expected = train(alone, range(5, STEPS), micro_batch=1)
    tolerance = {"loss": 2**-9, "norm": 2**-8} if saved.endswith("bf16") else {}
    for curve in gloo_pool(2).run(load_case, opened, path):
        assert_close(curve, expected, **tolerance)


@pytest.mark.parametrize("poison, where", [(float("inf"), "loss"), (float("nan"), "gradient")])
def test_a_non_finite_step_is_skipped_on_every_rank(poison: float, where: str):
    for engine in ("fsdp2", "fsdp2 bf16"):
        assert gloo_pool(2).run(skip_case, engine, poison, where) == [(False, True, True)] * 2, engine


def test_a_rank_that_holds_nothing_of_a_parameter_reads_nothing_of_it():
    """FSDP gives the first ranks whole rows: of a parameter of one row the others have none."""
    row = nn.Parameter(torch.ones(1, 4))
    held = Held("gate", row, (1, 4), Shard((1, 4), (0, 0)))
    empty = Fragment(held, 4, torch.empty(0), {})
    found = fragments._read(None, "model/gate", empty)  # type: ignore[arg-type]
    assert (tuple(found.shape), found.dtype) == ((0,), torch.float32)


def evaluated_case() -> list[bool]:
    """Whether each parameter is divided after an evaluation."""
    engine = build("fsdp2", ADAM)
    train(engine, range(1), micro_batch=1)
    tokens, labels = global_rows(0)
    engine.evaluate(split(tokens, labels, micro_batch=1, rank=env.rank(), ranks=2))
    return [hasattr(p, "to_local") for p in engine.model.parameters()]


def test_an_evaluation_leaves_the_weights_divided():
    """Gathered ones are no copies of each other's parts, and would not be what is saved."""
    assert all(all(divided) for divided in gloo_pool(2).run(evaluated_case))
