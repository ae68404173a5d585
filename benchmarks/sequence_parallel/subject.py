"""What is measured: a model on a mesh inside its engine, and batches for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data_pipeline.loader import Batch
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig, SequenceConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.engines.factory import build_engine

__all__ = ["Subject", "make_batches"]


@dataclass(frozen=True)
class Subject:
    """A model in its engine; the same object gives the same weights on every rank.

    Attributes:
        model: the architecture.
        dp, sp: the mesh, which must fit the process group.
        mode: how sp ranks work together.
        engine, zero_stage: who trains.
        forwards_first: micro-batches whose forward passes run before their backward passes.
    """

    model: ModelConfig
    dp: int = 1
    sp: int = 1
    mode: str = "state_passing"
    engine: str = "local"
    zero_stage: int = 1
    forwards_first: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def mesh(self) -> Mesh:
        """This rank's place."""
        axes = MeshConfig(dp=self.dp, sp=self.sp)
        return build_mesh(axes, sequence=SequenceConfig(mode=self.mode), device="cpu")  # type: ignore[arg-type]

    def build(self, mesh: Mesh | None = None) -> Engine:
        """Weights and optimizer state of this rank, on ``mesh`` or on one of its own."""
        mesh = self.mesh() if mesh is None else mesh
        model = build_language_model(self.model, seed=0)
        segments = apply_parallelism(model, mesh)
        training = TrainingConfig(
            steps=1,
            global_batch_tokens=1,
            engine=self.engine,  # type: ignore[arg-type]
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
            precision="fp32",
            forwards_first=self.forwards_first,
        )
        return build_engine(model, training, optimizer=self.optimizer, mesh=mesh, segments=segments)


def make_batches(
    vocab_size: int, *, rows: int, length: int, micro_batches: int = 1, seed: int = 0
) -> list[Batch]:
    """``micro_batches`` of ``rows`` whole rows of ``length`` random tokens, each row one document."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(micro_batches):
        stream = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
        bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
        found.append(Batch(tokens=tokens, labels=labels, cu_seqlens=bounds, valid_tokens=labels.numel()))
    return found
