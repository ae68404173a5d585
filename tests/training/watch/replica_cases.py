"""What the replica tests run on the ranks of a pool."""

from __future__ import annotations

import torch

from tests.training import engine_cases
from tests.training.stand_in import TinyModel
from trellis_dist.models.parallel_kind import ParallelKind, declare, keep_shard
from trellis_dist.parallel import env
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import build_mesh
from trellis_dist.training.engines.base import EngineOptions
from trellis_dist.training.watch.replicas import ReplicaError, check_replicas, why_no_copies

Flip = tuple[int, str, int] | None  # rank, parameter, element


def check_case(engine: str, axes: dict[str, int], flip: Flip) -> tuple[str | None, str]:
    """(why there are no copies, what the check says, "" for nothing) with one bit flipped."""
    mesh = build_mesh(MeshConfig(**axes))
    model = TinyModel()
    if mesh.tp > 1:  # as apply_parallelism does with heads
        model.hidden = keep(model.hidden, mesh.tp_rank, mesh.tp)
    built = engine_cases.wrap(model, engine, EngineOptions(optimizer=engine_cases.ADAM, mesh=mesh))
    if engine == "zero3-kept":  # the first step gathers what it then keeps
        engine_cases.train(built, range(1), micro_batch=1)
    if flip is not None and flip[0] == env.rank():
        parameter = dict(built.model.named_parameters())[flip[1]]
        held = getattr(parameter, "ds_tensor", parameter) if engine == "zero3" else parameter
        local = engine_cases.local(held)
        local.view(-1).view(torch.int32)[flip[2]] ^= 1
    try:
        check_replicas(built.model, mesh, step=7)
    except ReplicaError as error:
        return why_no_copies(built.model, mesh), str(error)
    return why_no_copies(built.model, mesh), ""


def keep(parameter: torch.nn.Parameter, index: int, count: int) -> torch.nn.Parameter:
    declare(parameter, ParallelKind.SHARDED, dim=0)
    keep_shard(parameter, index=index, count=count)
    return parameter


def train_and_check_case(engine: str, steps: int) -> str:
    """After real steps the copies are still equal."""
    built = engine_cases.build(engine, engine_cases.ADAM)
    engine_cases.train(built, range(steps), micro_batch=1)
    try:
        check_replicas(built.model, engine_cases.replicas(), step=steps)
    except ReplicaError as error:
        return str(error)
    return ""
