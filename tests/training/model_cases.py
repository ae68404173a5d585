"""A small language model over a mesh of all three axes, for what engines do differently on each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.state import CheckpointReader
from data_pipeline.loader import Batch
from tests.training.engine_cases import ADAM, SGD, Curve, same_state, save, shown_gradients, state, wrap
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel import env
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, TensorConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.engines.base import Engine, EngineOptions

ROWS, ROW, VOCAB = 4, 32, 20
MODEL = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    dim=16,
    num_heads=2,
    mlp_hidden=24,
    trellis=TrellisConfig(slots=4, chunk_size=4),
)
# Adam with its usual eps would amplify the rounding of near-zero gradients.
OPTIMIZERS = {"sgd": SGD, "adam": dataclasses.replace(ADAM, eps=1e-3)}
Axes = tuple[int, int, int, bool]  # dp, sp, tp, Megatron's sequence parallelism
ALONE: Axes = (1, 1, 1, False)


@functools.cache
def mesh_of(axes: Axes) -> Mesh:
    """The mesh with these axes, made once per process."""
    dp, sp, tp, sequence_parallel = axes
    return build_mesh(
        MeshConfig(dp=dp, sp=sp, tp=tp), tensor=TensorConfig(sequence_parallel=sequence_parallel)
    )


def batches(step: int, mesh: Mesh) -> tuple[list[Batch], int]:
    """This replica's micro-batches of one packed row each, unequal masks and documents; all valid tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, ROW + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, : ROW // 4], labels[1, : ROW // 2] = -100, -100
    share = range(mesh.dp_rank * ROWS // mesh.dp, (mesh.dp_rank + 1) * ROWS // mesh.dp)
    made = [_row(tokens[row : row + 1, :-1], labels[row : row + 1], first=4 * (row + 1)) for row in share]
    return made, int((labels >= 0).sum())


def _row(tokens: torch.Tensor, labels: torch.Tensor, *, first: int) -> Batch:
    starts = torch.tensor([0, first, ROW], dtype=torch.int32)
    return Batch(tokens, labels, starts, int((labels >= 0).sum()))


def build(engine: str, axes: Axes, optimizer: str, *, seed: int = 1) -> Engine:
    """As ``engine_cases.build``, on a mesh."""
    name, *switches = engine.split()
    mesh = mesh_of(axes)
    model = build_language_model(MODEL, seed=seed)
    options = EngineOptions(
        optimizer=OPTIMIZERS[optimizer],
        mesh=mesh,
        segments=apply_parallelism(model, mesh),
        bf16="bf16" in switches,
        offload="offload" in switches,
        forwards_first=4 if "first4" in switches else 1,
    )
    return wrap(model, name, options)


def train(engine: Engine, mesh: Mesh, steps: range) -> Curve:
    curve = []
    for step in steps:
        micro, valid = batches(step, mesh)
        result = engine.train_step(micro, lr=0.01, valid_tokens=valid)
        assert result.applied
        curve.append((result.loss, result.grad_norm))
    return curve


def run_case(
    engine: str, axes: Axes, optimizer: str, fault: str = ""
) -> tuple[Curve, list[Any], list[float]]:
    """Curve of 3 steps, the gradients of the last, and an evaluation (nats and tokens over all ranks)."""
    mesh = mesh_of(axes)
    with fault_of(fault, mesh):
        built = build(engine, axes, optimizer)
        curve = train(built, mesh, range(2))
        with shown_gradients(built) as shown:
            curve += train(built, mesh, range(2, 3))
    nats, tokens = sum_scalars(built.evaluate(batches(99, mesh)[0]))
    return curve, shown, [nats / mesh.tp, tokens / (mesh.sp * mesh.tp)]


@contextlib.contextmanager
def fault_of(name: str, mesh: Mesh) -> Iterator[None]:
    """The mistakes that parity must catch."""
    from trellis_dist.parallel import tensor
    from trellis_dist.training.engines import deepspeed, hooks

    real_initialize, real_keep = deepspeed._deepspeed_config, tensor.keep_shard
    with pytest.MonkeyPatch.context() as patch:
        if name == "no sums over tp":
            patch.setattr(hooks, "partial_over_tensor", lambda parameter, mesh: False)
        elif name == "untagged":
            patch.setattr(tensor, "keep_shard", lambda p, **kw: (real_keep(p, **kw), untag(p)))
        elif name == "reduce_scatter":
            patch.setattr(deepspeed, "_deepspeed_config", lambda o, s: scattered(real_initialize(o, s)))
        else:
            assert not name, name
        yield


def untag(parameter: torch.Tensor) -> None:
    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def scattered(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"zero_optimization": config["zero_optimization"] | {"reduce_scatter": True}}


def resume_case(engine: str, axes: Axes, root: Path) -> bool:
    """2 + 2 steps through a checkpoint equal 4, bit for bit, on every rank."""
    mesh = mesh_of(axes)
    whole = build(engine, axes, "adam")
    train(whole, mesh, range(2))
    path = save(whole, root, 2)
    expected = train(whole, mesh, range(2, 4))
    resumed = build(engine, axes, "adam", seed=7)
    resumed.load(CheckpointReader(path), optimizer_steps=2)
    return train(resumed, mesh, range(2, 4)) == expected and same_state(state(whole), state(resumed))


def load_case(engine: str, axes: Axes, path: Path) -> Curve:
    built = build(engine, axes, "adam", seed=7)
    built.load(CheckpointReader(path), optimizer_steps=2)
    return train(built, mesh_of(axes), range(2, 4))


def skip_case(engine: str, axes: Axes, where: str) -> tuple[bool, bool, bool]:
    """(applied, unchanged, next step applied) for a step that is not finite on the last rank only."""
    mesh = mesh_of(axes)
    built = build(engine, axes, "adam")
    train(built, mesh, range(1))
    before = state(built)
    with poisoned(built, where):
        micro, valid = batches(1, mesh)
        skipped = built.train_step(micro, lr=0.01, valid_tokens=valid)
    unchanged = same_state(before, state(built))
    micro, valid = batches(2, mesh)
    return skipped.applied, unchanged, built.train_step(micro, lr=0.01, valid_tokens=valid).applied


@contextlib.contextmanager
def poisoned(engine: Engine, where: str) -> Iterator[None]:
    """On the last rank the loss is infinite, or NaN runs back into its blocks."""
    model: Any = engine.model
    real, last = model.loss_sum, env.rank() == env.world_size() - 1
    handle = None
    if last and where == "loss":
        model.loss_sum = lambda *args, **options: real(*args, **options) + float("inf")
    elif last:
        handle = model.norm.register_forward_hook(_nan_backward)
    yield
    model.loss_sum = real
    if handle is not None:
        handle.remove()


def _nan_backward(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    result = output.clone()
    if result.requires_grad:
        result.register_hook(lambda gradient: gradient * float("nan"))
    return result
