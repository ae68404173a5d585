"""Every engine takes the gradient of the mean over the global batch's valid tokens, and resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints.state import CheckpointReader, save_checkpoint
from tests.distributed import gloo_pool
from tests.training.stand_in import TinyModel, global_rows, split
from trellis_dist.parallel import env
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.engines.factory import check_engine
from trellis_dist.training.engines.local import LocalEngine

CPU = torch.device("cpu")
SGD = OptimizerConfig(kind="sgd", lr=0.2, clip_norm=0.0, weight_decay=0.0)
ADAM = OptimizerConfig(kind="adamw", lr=0.02, clip_norm=0.3, weight_decay=0.1)
STEPS = 10
Curve = list[tuple[float, float]]


def build(engine: str, optimizer: OptimizerConfig, *, seed: int = 0) -> Engine:
    name, _, precision = engine.partition(" ")
    bf16 = precision == "bf16"
    if name == "local":
        return LocalEngine(TinyModel(seed), optimizer=optimizer, device=CPU, bf16=bf16)
    from trellis_dist.training.engines.deepspeed import DeepSpeedEngine

    stage = int(name.removeprefix("zero"))
    return DeepSpeedEngine(TinyModel(seed), optimizer=optimizer, device=CPU, zero_stage=stage, bf16=bf16)


def train(
    engine: Engine, steps: range, *, micro_batch: int, lr: float = 0.02, replica_mean: bool = False
) -> Curve:
    """Loss and gradient norm per step; ``replica_mean`` is the mistake the parity test must catch."""
    rank, ranks = (env.rank(), env.world_size()) if not isinstance(engine, LocalEngine) else (0, 1)
    curve = []
    for step in steps:
        tokens, labels = global_rows(step)
        batches = split(tokens, labels, micro_batch=micro_batch, rank=rank, ranks=ranks)
        valid = int((labels >= 0).sum())
        if replica_mean:
            valid = ranks * sum(batch.valid_tokens for batch in batches)
        result = engine.train_step(batches, lr=lr, valid_tokens=valid)
        assert result.applied
        curve.append((result.loss, result.grad_norm))
    return curve


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def save(engine: Engine, root: Path, step: int) -> Path:
    rank, ranks = (env.rank(), env.world_size()) if not isinstance(engine, LocalEngine) else (0, 1)
    state = {"optimizer_steps": engine.optimizer_steps}
    return save_checkpoint(
        root,
        step=step,
        tensors=engine.logical_tensors(),
        run_state=state,
        rank=rank,
        world_size=ranks,
        agree=env.agree,
    )


# Cases that run on the ranks of the pool.


def curve_case(
    engine: str, optimizer: OptimizerConfig, micro_batch: int, lr: float, replica_mean: bool
) -> Curve:
    built = build(engine, optimizer)
    return train(built, range(STEPS), micro_batch=micro_batch, lr=lr, replica_mean=replica_mean)


def resume_case(engine: str, root: Path) -> bool:
    """5 + 5 steps through a checkpoint equal 10, bit for bit; the checkpoint stays for the other engine."""
    whole = build(engine, ADAM)
    train(whole, range(5), micro_batch=1)
    path = save(whole, root, 5)
    expected = train(whole, range(5, STEPS), micro_batch=1)
    resumed = build(engine, ADAM, seed=7)
    resumed.load(CheckpointReader(path), optimizer_steps=5)
    assert train(resumed, range(5, STEPS), micro_batch=1) == expected
    before, after = weights(whole), weights(resumed)
    return all(torch.equal(before[name], after[name]) for name in before)


def load_case(engine: str, path: Path) -> Curve:
    built = build(engine, ADAM, seed=7)
    built.load(CheckpointReader(path), optimizer_steps=5)
    return train(built, range(5, STEPS), micro_batch=1)


def skip_case(engine: str, poison: float, where: str) -> tuple[bool, bool, bool]:
    """A step with a non-finite loss or gradient on the last rank: skipped everywhere, the next one works."""
    built = build(engine, ADAM)
    train(built, range(2), micro_batch=1)
    before = weights(built)
    model = built.model
    if env.rank() == env.world_size() - 1:
        if where == "loss":
            model.poison = poison
        else:
            handle = model.hidden.register_hook(lambda gradient: gradient * poison)
    tokens, labels = global_rows(2)
    batches = split(tokens, labels, micro_batch=1, rank=env.rank(), ranks=env.world_size())
    result = built.train_step(batches, lr=0.02, valid_tokens=10)
    unchanged = all(torch.equal(before[name], p) for name, p in weights(built).items())
    model.poison = 0.0
    if where != "loss" and env.rank() == env.world_size() - 1:
        handle.remove()
    healthy = build(engine, ADAM)
    train(healthy, range(2), micro_batch=1)
    same = train(built, range(3, 5), micro_batch=1) == train(healthy, range(3, 5), micro_batch=1)
    return result.applied, unchanged, same


def assert_close(actual: Curve, expected: Curve, *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    losses, norms = torch.tensor(actual).double().T, torch.tensor(expected).double().T
    torch.testing.assert_close(losses[0], norms[0], rtol=loss, atol=0)
    torch.testing.assert_close(losses[1], norms[1], rtol=norm, atol=0)


@pytest.fixture(scope="module")
def single() -> Curve:
    """One process, the whole batch in one micro-batch, SGD without clipping."""
    return train(build("local", SGD), range(STEPS), micro_batch=4, lr=0.2)


def test_accumulation_does_not_change_the_step(single: Curve):
    assert_close(train(build("local", SGD), range(STEPS), micro_batch=1, lr=0.2), single)


@pytest.mark.parametrize("engine", ["zero0", "zero1"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_two_replicas_match_one_process(engine: str, micro_batch: int, single: Curve):
    for curve in gloo_pool(2).run(curve_case, engine, SGD, micro_batch, 0.2, False):
        assert_close(curve, single)


@pytest.mark.parametrize("engine", ["zero0", "zero1"])
def test_adam_and_clipping_match_one_process(engine: str):
    expected = train(build("local", ADAM), range(STEPS), micro_batch=2)
    for curve in gloo_pool(2).run(curve_case, engine, ADAM, 2, 0.02, False):
        assert_close(curve, expected)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("optimizer, lr", [(SGD, 0.2), (ADAM, 0.02)])
def test_bf16_replicas_match_one_process(optimizer: OptimizerConfig, lr: float, micro_batch: int):
    """The default on GPUs. Both round a micro-batch's gradient to bf16, ZeRO also what it reduces."""
    expected = train(build("local bf16", optimizer), range(STEPS), micro_batch=micro_batch, lr=lr)
    for curve in gloo_pool(2).run(curve_case, "zero1 bf16", optimizer, micro_batch, lr, False):
        assert_close(curve, expected, loss=2**-9, norm=2**-8)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero1 bf16"])
def test_a_mean_per_replica_fails_the_parity_check(engine: str, single: Curve):
    curve = gloo_pool(2).run(curve_case, engine, SGD, 1, 0.2, True)[0]
    with pytest.raises(AssertionError):
        assert_close(curve, single, loss=2**-9, norm=2**-8)


def test_a_local_run_resumes_bit_for_bit(tmp_path: Path):
    assert resume_case("local", tmp_path)


@pytest.mark.parametrize("engine", ["zero0", "zero1"])
def test_deepspeed_resumes_bit_for_bit_and_opens_in_the_local_engine(engine: str, tmp_path: Path):
    assert gloo_pool(2).run(resume_case, engine, tmp_path) == [True, True]
    expected = train(build("local", ADAM), range(STEPS), micro_batch=1)[5:]
    assert_close(load_case("local", tmp_path / "step-00000005"), expected)


@pytest.mark.parametrize("engine", ["zero0", "zero1"])
def test_a_local_checkpoint_opens_in_deepspeed(engine: str, tmp_path: Path):
    local = build("local", ADAM)
    train(local, range(5), micro_batch=1)
    path = save(local, tmp_path, 5)
    expected = train(local, range(5, STEPS), micro_batch=1)
    for curve in gloo_pool(2).run(load_case, engine, path):
        assert_close(curve, expected)


@pytest.mark.parametrize("poison, where", [(float("inf"), "loss"), (float("nan"), "gradient")])
def test_a_non_finite_step_is_skipped_on_every_rank(poison: float, where: str):
    assert skip_case("local", poison, where) == (False, True, True)
    for engine in ("zero0", "zero1", "zero1 bf16"):
        assert gloo_pool(2).run(skip_case, engine, poison, where) == [(False, True, True)] * 2


def test_bf16_without_masters_is_refused_before_anything_starts():
    training = TrainingConfig(steps=1, global_batch_tokens=1, zero_stage=0)
    with pytest.raises(ValueError, match=r"zero_stage = 0 .* use training\.zero_stage = 1, or"):
        check_engine(training, dp=2, sp=1)
    check_engine(dataclasses.replace(training, precision="fp32"), dp=2, sp=1)
    check_engine(dataclasses.replace(training, engine="local"), dp=1, sp=1)
    check_engine(dataclasses.replace(training, zero_stage=1), dp=2, sp=1)


def test_bf16_replicas_resume_bit_for_bit_and_open_in_the_local_engine(tmp_path: Path):
    assert gloo_pool(2).run(resume_case, "zero1 bf16", tmp_path) == [True, True]
    reader = CheckpointReader(tmp_path / "step-00000005")
    assert reader.shape("master/hidden") == (64,)
    expected = train(build("local bf16", ADAM), range(STEPS), micro_batch=1)[5:]
    assert_close(load_case("local bf16", tmp_path / "step-00000005"), expected, loss=2**-9, norm=2**-8)


def test_bf16_keeps_fp32_masters_and_gradients():
    engine = LocalEngine(TinyModel(), optimizer=ADAM, device=CPU, bf16=True)
    curve = train(engine, range(STEPS), micro_batch=1)
    expected = train(build("local", ADAM), range(STEPS), micro_batch=1)
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.03, atol=0.03)
    parts = {part.name: part.local for part in engine.logical_tensors()}
    assert parts["model/hidden"].dtype == torch.bfloat16
    assert parts["master/hidden"].dtype == torch.float32
    assert torch.equal(parts["model/hidden"], parts["master/hidden"].view(8, 8).bfloat16())


def test_a_bf16_checkpoint_resumes_exactly_and_opens_in_fp32(tmp_path: Path):
    engine = LocalEngine(TinyModel(), optimizer=ADAM, device=CPU, bf16=True)
    train(engine, range(5), micro_batch=1)
    path = save(engine, tmp_path, 5)
    masters = {part.name: part.local.clone() for part in engine.logical_tensors()}
    expected = train(engine, range(5, STEPS), micro_batch=1)
    resumed = LocalEngine(TinyModel(7), optimizer=ADAM, device=CPU, bf16=True)
    resumed.load(CheckpointReader(path), optimizer_steps=5)
    assert train(resumed, range(5, STEPS), micro_batch=1) == expected
    full = build("local", ADAM, seed=7)
    full.load(CheckpointReader(path), optimizer_steps=5)
    assert torch.equal(weights(full)["hidden"].view(-1), masters["master/hidden"])


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path):
    engine = build("local", SGD)
    train(engine, range(1), micro_batch=1)
    reader = CheckpointReader(save(engine, tmp_path, 1))
    with pytest.raises(ValueError, match=r"another optimizer\.kind"):
        build("local", ADAM).load(reader, optimizer_steps=1)
    other = TinyModel()
    other.hidden = torch.nn.Parameter(torch.zeros(8, 9))
    with pytest.raises(ValueError, match=r"hidden has shape \(8, 8\), the model's has \(8, 9\)"):
        LocalEngine(other, optimizer=SGD, device=CPU).load(reader, optimizer_steps=1)


def test_decay_applies_to_matrices_only():
    from trellis_dist.training.optimizer import parameter_groups

    groups = parameter_groups(TinyModel().named_parameters(), 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.1), (2, 0.0)]


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
