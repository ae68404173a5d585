"""Every engine takes the gradient of the mean over the global batch's valid tokens, and resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints.state import CheckpointReader
from tests.distributed import gloo_pool
from tests.training.engine_cases import (
    ADAM,
    SGD,
    STEPS,
    Curve,
    assemble,
    assert_close,
    build,
    curve_case,
    gradients_case,
    load_case,
    resume_case,
    save,
    skip_case,
    state,
    train,
)
from tests.training.stand_in import TinyModel
from trellis_dist.models.init import Constant
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.accumulation import accumulate
from trellis_dist.training.engines.base import EngineOptions
from trellis_dist.training.engines.factory import build_engine, check_engine
from trellis_dist.training.engines.local import LocalEngine

ENGINES = ["local", "zero0", "zero1", "zero2", "zero3", "zero3-kept"]


@pytest.fixture(scope="module")
def single() -> Curve:
    """One process, the whole batch in one micro-batch, SGD without clipping."""
    return train(build("local", SGD), range(STEPS), micro_batch=4, lr=0.2)


def test_accumulation_does_not_change_the_step(single: Curve):
    assert_close(train(build("local", SGD), range(STEPS), micro_batch=1, lr=0.2), single)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_two_replicas_match_one_process(engine: str, micro_batch: int, single: Curve):
    for curve in gloo_pool(2).run(curve_case, engine, SGD, micro_batch, 0.2):
        assert_close(curve, single)


@pytest.mark.parametrize("engine", ENGINES)
def test_adam_and_clipping_match_one_process(engine: str):
    expected = train(build("local", ADAM), range(STEPS), micro_batch=2)
    for curve in gloo_pool(2).run(curve_case, engine, ADAM, 2, 0.02):
        assert_close(curve, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_passes_that_run_first_change_nothing(engine: str):
    expected = gloo_pool(2).run(curve_case, engine, ADAM, 1, 0.02)
    found = gloo_pool(2).run(curve_case, f"{engine} first2", ADAM, 1, 0.02)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_at_most_that_many_forward_passes_run_first():
    """Five micro-batches, two at a time: both kinds of passes keep the batches' order."""
    log: list[str] = []

    def forward(batch: int) -> torch.Tensor:
        log.append(f"f{batch}")
        return torch.tensor(float(batch))

    def backward(loss: torch.Tensor, last: bool) -> None:
        log.append(f"b{int(loss)}{'!' if last else ''}")

    total = accumulate([1, 2, 3, 4, 5], forward=forward, backward=backward, forwards_first=2)
    assert " ".join(log) == "f1 f2 b1 b2 f3 f4 b3 b4 f5 b5!"
    assert float(total) == 15.0


@pytest.mark.parametrize("engine", ENGINES)
def test_the_inspector_sees_the_gradient_of_the_mean(engine: str):
    """Two micro-batches on each of two ranks; the slices of all ranks make up one process's gradient."""
    expected = assemble([gradients_case("local")])
    found = assemble(gloo_pool(2).run(gradients_case, engine))
    assert (
        found.keys() == expected.keys() == {f"gradient/{name}" for name, _ in TinyModel().named_parameters()}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("optimizer, lr", [(SGD, 0.2), (ADAM, 0.02)])
def test_bf16_replicas_match_one_process(optimizer: OptimizerConfig, lr: float, micro_batch: int):
    """The default on GPUs. Both round a micro-batch's gradient to bf16, ZeRO also what it reduces."""
    expected = train(build("local bf16", optimizer), range(STEPS), micro_batch=micro_batch, lr=lr)
    for engine in ("local bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16"):
        for curve in gloo_pool(2).run(curve_case, engine, optimizer, micro_batch, lr):
            assert_close(curve, expected, loss=2**-9, norm=2**-8)


@pytest.mark.parametrize("engine", [*ENGINES, "zero1 bf16"])
def test_a_mean_per_replica_fails_the_parity_check(engine: str, single: Curve):
    curve = gloo_pool(2).run(curve_case, engine, SGD, 1, 0.2, True)[0]
    with pytest.raises(AssertionError):
        assert_close(curve, single, loss=2**-9, norm=2**-8)


def test_a_local_run_resumes_bit_for_bit(tmp_path: Path):
    assert resume_case("local", tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_replicas_resume_bit_for_bit_and_opens_in_the_local_engine(engine: str, tmp_path: Path):
    assert gloo_pool(2).run(resume_case, engine, tmp_path) == [True, True]
    expected = train(build("local", ADAM), range(STEPS), micro_batch=1)[5:]
    assert_close(load_case("local", tmp_path / "step-00000005"), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_one_process_opens_on_replicas(engine: str, tmp_path: Path):
    local = build("local", ADAM)
    train(local, range(5), micro_batch=1)
    path = save(local, tmp_path, 5)
    expected = train(local, range(5, STEPS), micro_batch=1)
    for curve in gloo_pool(2).run(load_case, engine, path):
        assert_close(curve, expected)


@pytest.mark.parametrize("poison, where", [(float("inf"), "loss"), (float("nan"), "gradient")])
def test_a_non_finite_step_is_skipped_on_every_rank(poison: float, where: str):
    assert skip_case("local", poison, where) == (False, True, True)
    for engine in (*ENGINES, "local bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16"):
        assert gloo_pool(2).run(skip_case, engine, poison, where) == [(False, True, True)] * 2, engine


def test_bf16_without_masters_is_refused_before_anything_starts():
    training = TrainingConfig(steps=1, global_batch_tokens=1, zero_stage=0)
    with pytest.raises(ValueError, match=r"zero_stage = 0 .* use training\.zero_stage = 1, or"):
        check_engine(training)
    check_engine(dataclasses.replace(training, precision="fp32"))
    check_engine(dataclasses.replace(training, engine="local"))
    check_engine(dataclasses.replace(training, zero_stage=1))


def test_bf16_replicas_resume_bit_for_bit_and_open_in_the_local_engine(tmp_path: Path):
    assert gloo_pool(2).run(resume_case, "zero1 bf16", tmp_path) == [True, True]
    reader = CheckpointReader(tmp_path / "step-00000005")
    assert reader.shape("master/hidden") == reader.shape("optimizer/exp_avg/hidden") == (8, 8)
    expected = train(build("local bf16", ADAM), range(STEPS), micro_batch=1)[5:]
    assert_close(load_case("local bf16", tmp_path / "step-00000005"), expected, loss=2**-9, norm=2**-8)


def test_bf16_keeps_fp32_masters_and_gradients():
    engine = build("local bf16", ADAM)
    curve = train(engine, range(STEPS), micro_batch=1)
    expected = train(build("local", ADAM), range(STEPS), micro_batch=1)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.03, atol=0.03)
    parts = {part.name: part.local for part in engine.logical_tensors()}
    assert parts["model/hidden"].dtype == torch.bfloat16
    assert parts["master/hidden"].dtype == torch.float32
    assert torch.equal(parts["model/hidden"], parts["master/hidden"].bfloat16())


def test_a_bf16_checkpoint_resumes_exactly_and_opens_in_fp32(tmp_path: Path):
    engine = build("local bf16", ADAM)
    train(engine, range(5), micro_batch=1)
    path = save(engine, tmp_path, 5)
    masters = {part.name: part.local.clone() for part in engine.logical_tensors()}
    expected = train(engine, range(5, STEPS), micro_batch=1)
    resumed = build("local bf16", ADAM, seed=7)
    resumed.load(CheckpointReader(path), optimizer_steps=5)
    assert train(resumed, range(5, STEPS), micro_batch=1) == expected
    full = build("local", ADAM, seed=7)
    full.load(CheckpointReader(path), optimizer_steps=5)
    assert torch.equal(state(full)["hidden"], masters["master/hidden"])


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path):
    engine = build("local", SGD)
    train(engine, range(1), micro_batch=1)
    reader = CheckpointReader(save(engine, tmp_path, 1))
    with pytest.raises(ValueError, match=r"another optimizer\.kind"):
        build("local", ADAM).load(reader, optimizer_steps=1)
    other = TinyModel()
    other.hidden = torch.nn.Parameter(torch.zeros(8, 9))
    with pytest.raises(ValueError, match=r"hidden has shape \(8, 8\), the model's has \(8, 9\)"):
        LocalEngine(other, EngineOptions(optimizer=SGD, mesh=Mesh())).load(reader, optimizer_steps=1)


def test_decay_applies_to_matrices_only():
    from trellis_dist.training.optimizer import parameter_groups

    groups = parameter_groups(TinyModel().named_parameters(), 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.1), (2, 0.0)]


def test_masters_are_decayed_as_their_weights_are():
    """What a parameter starts as is declared on it, not on the fp32 copy that is updated."""
    spared = TinyModel()
    spared.hidden.initial = Constant(1.0)
    engine = LocalEngine(spared, EngineOptions(optimizer=ADAM, mesh=Mesh(), bf16=True))
    decays = [(len(group["params"]), group["weight_decay"]) for group in engine._optimizer.param_groups]
    assert decays == [(2, 0.1), (3, 0.0)]


def test_the_factory_builds_what_the_recipe_names():
    settings = {"steps": 1, "global_batch_tokens": 1, "forwards_first": 3, "offload_optimizer": True}
    training = TrainingConfig(engine="local", z_loss=0.5, **settings)
    mesh = Mesh()
    segments = Segments(mesh, chunk_size=1)
    built = build_engine(TinyModel(), training, optimizer=SGD, mesh=mesh, segments=segments)
    assert isinstance(built, LocalEngine)
    assert built._options == EngineOptions(
        optimizer=SGD, mesh=mesh, segments=segments, z_loss=0.5, offload=True, forwards_first=3
    )


def test_decay_spares_norm_weights_of_two_dimensions():
    from trellis_dist.models.config import ModelConfig
    from trellis_dist.models.language_model import LanguageModel
    from trellis_dist.training.optimizer import parameter_groups

    named = dict(
        LanguageModel(ModelConfig(vocab_size=16, num_layers=1, dim=8, num_heads=2)).named_parameters()
    )
    decayed = {id(p) for p in parameter_groups(named.items(), 0.1)[0]["params"]}
    spared = {name for name, p in named.items() if p.ndim >= 2 and id(p) not in decayed}
    assert spared == {name for name in named if "mixer.norm_weight" in name}
    assert spared
    assert not dist.is_initialized()
