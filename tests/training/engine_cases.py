"""What the engine tests run on the ranks of a pool: build an engine by name, train, save, load, poison."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints.logical import LogicalTensor
from checkpoints.state import CheckpointReader, save_checkpoint
from tests.training.stand_in import TinyModel, global_rows, split
from trellis_dist.parallel import env
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.engines.base import Engine, EngineOptions
from trellis_dist.training.engines.local import LocalEngine

SGD = OptimizerConfig(kind="sgd", lr=0.2, clip_norm=0.0, weight_decay=0.0)
ADAM = OptimizerConfig(kind="adamw", lr=0.02, clip_norm=0.3, weight_decay=0.1)
STEPS = 10
Curve = list[tuple[float, float]]


@functools.cache
def replicas() -> Mesh:
    """All ranks along dp; a plain process is a mesh of its own."""
    return build_mesh(MeshConfig())


def build(engine: str, optimizer: OptimizerConfig, *, seed: int = 0) -> Engine:
    """ "local", "zero0" to "zero3" or "fsdp2", then what is switched on: "bf16", "offload", "first2"."""
    name, *switches = engine.split()
    options = EngineOptions(
        optimizer=optimizer,
        mesh=replicas(),
        bf16="bf16" in switches,
        offload="offload" in switches,
        forwards_first=2 if "first2" in switches else 1,
    )
    return wrap(TinyModel(seed), name, options)


def wrap(model: torch.nn.Module, name: str, options: EngineOptions) -> Engine:
    """The engine called ``name`` around ``model``.

    At "zero3" no parameter is small enough to stay whole on every rank, at "zero3-kept" all are.
    """
    if name == "local":
        return LocalEngine(model, options)
    if name == "fsdp2":
        from trellis_dist.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(model, options)
    from trellis_dist.training.engines.deepspeed import DeepSpeedEngine

    stage, _, kept = name.removeprefix("zero").partition("-")
    options = dataclasses.replace(options, persistence_threshold=100_000 if kept else 0)
    return DeepSpeedEngine(model, options, zero_stage=int(stage))


def train(
    engine: Engine, steps: range, *, micro_batch: int, lr: float = 0.02, replica_mean: bool = False
) -> Curve:
    """Loss and gradient norm per step; ``replica_mean`` is the mistake the parity test must catch."""
    rank, ranks = env.rank(), env.world_size()
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


def state(engine: Engine) -> dict[Any, torch.Tensor]:
    """Everything this rank writes, and its parameters."""
    held = {(part.name, part.offset): part.local.clone() for part in engine.logical_tensors()}
    return held | {name: local(p).clone() for name, p in engine.model.named_parameters()}


def local(parameter: torch.Tensor) -> torch.Tensor:
    return getattr(parameter.detach(), "to_local", parameter.detach)()


def same_state(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save(engine: Engine, root: Path, step: int) -> Path:
    return save_checkpoint(
        root,
        step=step,
        tensors=engine.logical_tensors(),
        run_state={"optimizer_steps": engine.optimizer_steps},
        rank=env.rank(),
        world_size=env.world_size(),
        agree=env.agree,
    )


def curve_case(
    engine: str, optimizer: OptimizerConfig, micro_batch: int, lr: float, replica_mean: bool = False
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
    return same_state(state(whole), state(resumed))


def load_case(engine: str, path: Path) -> Curve:
    built = build(engine, ADAM, seed=7)
    built.load(CheckpointReader(path), optimizer_steps=5)
    return train(built, range(5, STEPS), micro_batch=1)


def skip_case(engine: str, poison: float, where: str) -> tuple[bool, bool, bool]:
    """A step with a non-finite loss or gradient on the last rank: skipped everywhere, the next one works."""
    built = build(engine, ADAM)
    train(built, range(2), micro_batch=1)
    before = state(built)
    model, last = built.model, env.rank() == env.world_size() - 1
    if last and where == "loss":
        model.poison = poison
    elif last:
        model.factor = poison
    tokens, labels = global_rows(2)
    batches = split(tokens, labels, micro_batch=1, rank=env.rank(), ranks=env.world_size())
    result = built.train_step(batches, lr=0.02, valid_tokens=10)
    unchanged = same_state(before, state(built))
    model.poison, model.factor = 0.0, 1.0
    healthy = build(engine, ADAM)
    train(healthy, range(2), micro_batch=1)
    same = train(built, range(3, 5), micro_batch=1) == train(healthy, range(3, 5), micro_batch=1)
    return result.applied, unchanged, same


def gradients_case(engine: str) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """The gradient slices this rank shows in its second step of two micro-batches."""
    built = build(engine, SGD)
    train(built, range(1), micro_batch=1, lr=0.2)
    with shown_gradients(built) as shown:
        train(built, range(1, 2), micro_batch=1, lr=0.2)
    return shown


@contextlib.contextmanager
def shown_gradients(engine: Engine) -> Iterator[list[Any]]:
    """Collect what the engine shows its inspector, as plain tuples."""
    shown: list[Any] = []
    engine.inspector = lambda parts: shown.extend(_plain(part) for part in parts)
    yield shown
    engine.inspector = None


def _plain(part: LogicalTensor) -> tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]:
    return part.name, part.global_shape, part.offset, part.local.clone()


def assemble(ranks: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's slices; replicas must agree, and nothing may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, values in (part for parts in ranks for part in parts):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        index = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        known = ~target[index].isnan()
        assert torch.equal(target[index][known], values[known]), f"replicas of {name} differ"
        target[index] = values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def assert_close(actual: Curve, expected: Curve, *, loss: float = 1e-5, norm: float = 1e-4) -> None:
    losses, norms = torch.tensor(actual).double().T, torch.tensor(expected).double().T
    torch.testing.assert_close(losses[0], norms[0], rtol=loss, atol=0)
    torch.testing.assert_close(losses[1], norms[1], rtol=norm, atol=0)
