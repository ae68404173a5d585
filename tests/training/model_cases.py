"""A small language model over a mesh of all three axes, for what engines do differently on each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints.state import CheckpointReader
from data_pipeline.loader import Batch
from tests.training.engine_cases import ADAM, SGD, Curve, same_state, save, state, wrap
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


def evaluate_case(engine: str, axes: Axes) -> tuple[float, float]:
    """Nats and tokens over all ranks, before any step."""
    mesh = mesh_of(axes)
    nats, tokens = sum_scalars(build(engine, axes, "sgd").evaluate(batches(99, mesh)[0]))
    return nats / mesh.tp, tokens / (mesh.sp * mesh.tp)


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
