"""The engines that the checkpoint benchmark saves from and loads into, in this process or in two ranks."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch

from checkpoints.reader import CheckpointReader
from data_pipeline.loader import Batch
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import build_mesh
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.engines.factory import build_engine

__all__ = ["OTHER_MESHES", "load_on", "make_engine", "one_batch"]

LENGTH, LOADS, LIMIT_S = 256, 3, 600.0
OTHER_MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp 2": ({"tp": 2}, {"engine": "local"}),
    "dp 2, ZeRO 1": ({"dp": 2}, {"engine": "deepspeed", "zero_stage": 1}),
}


def make_engine(model: ModelConfig, mesh: dict[str, int], training: dict[str, Any]) -> Engine:
    """The model on this process's part of the mesh, nothing loaded."""
    built, on = build_language_model(model, seed=0, device="cpu"), build_mesh(MeshConfig(**mesh))
    options = TrainingConfig(steps=1, global_batch_tokens=LENGTH, micro_batch=1, precision="fp32", **training)
    segments = apply_parallelism(built, on)
    return build_engine(built, options, optimizer=OptimizerConfig(), mesh=on, segments=segments)


def one_batch(vocabulary: int) -> Batch:
    """One row of random tokens."""
    tokens = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, LENGTH], dtype=torch.int32)
    return Batch(tokens, tokens.roll(-1, 1), starts, LENGTH)


def load_on(name: str, model: ModelConfig, path: Path) -> list[list[float]]:
    """Seconds in which each of two ranks over gloo loads the checkpoint, a few times."""
    import torch.distributed as dist

    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = context.Queue()
    ranks = [
        context.Process(target=_load_rank, args=(rank, store.port, model, name, path, found))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    try:
        rows = [found.get(timeout=LIMIT_S) for _ in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return rows


def _load_rank(rank: int, port: int, model: ModelConfig, name: str, path: Path, found: Any) -> None:
    """One rank: load three times and put the seconds into the queue."""
    from trellis_dist.parallel import env

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    env.init_distributed("cpu", timeout_s=LIMIT_S)
    engine, times = make_engine(model, *OTHER_MESHES[name]), []
    for _ in range(LOADS):
        env.agree(True)  # all begin together
        begin = time.perf_counter()
        engine.load(CheckpointReader(path), optimizer_steps=1)
        times.append(time.perf_counter() - begin)
    found.put(times)
    time.sleep(LIMIT_S)  # the parent ends it: a rank that leaves first would break the other's group
