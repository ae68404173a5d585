"""The local engine over sequence segments: the losses and gradient norms of one process."""

from __future__ import annotations

import torch

from data_pipeline.loader import Batch
from tests.distributed import gloo_pool
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model
from trellis_dist.parallel.apply import apply_parallelism
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.training.collectives import sum_scalars
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.engines.base import EngineOptions
from trellis_dist.training.engines.local import LocalEngine

ROWS, ROW, VOCAB = 4, 32, 19
MODEL = ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    dim=16,
    num_heads=2,
    mlp_hidden=24,
    trellis=TrellisConfig(slots=4, chunk_size=4),
)


def batches(step: int) -> list[Batch]:
    """Two micro-batches of packed rows: documents at multiples of the chunk size, unequal masks."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, ROW + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, : ROW // 4], labels[1] = -100, -100
    made = []
    for rows in torch.arange(ROWS).split(2):
        starts = torch.tensor([0, 12, ROW, ROW + 20, 2 * ROW], dtype=torch.int32)
        y = labels[rows]
        made.append(Batch(tokens[rows, :-1], y, starts, int((y >= 0).sum())))
    return made


def curve(mesh: Mesh, optimizer: OptimizerConfig) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = build_language_model(MODEL, seed=1)
    segments = apply_parallelism(model, mesh)
    engine = LocalEngine(model, EngineOptions(optimizer=optimizer, mesh=mesh, segments=segments))
    results = []
    for step in range(6):
        micro = batches(step)
        valid = sum(batch.valid_tokens for batch in micro)
        result = engine.train_step(micro, lr=optimizer.lr, valid_tokens=valid)
        results.append((result.loss, result.grad_norm))
    nats, tokens = sum_scalars(engine.evaluate(batches(9)))
    results.append((nats, tokens / mesh.sp))
    names = [part.name for part in engine.logical_tensors()]
    assert bool(names) == (mesh.rank == 0), "one rank writes what all hold"
    return results


def split_case(optimizer: OptimizerConfig) -> list[tuple[float, float]]:
    return curve(build_mesh(MeshConfig(dp=1, sp=2)), optimizer)


def test_two_segments_match_one_process():
    for optimizer in (
        OptimizerConfig(kind="sgd", lr=0.1, clip_norm=0.0),
        OptimizerConfig(lr=0.01, eps=1e-3, clip_norm=0.1),  # 1e-8 would amplify rounding
    ):
        expected = torch.tensor(curve(Mesh(), optimizer), dtype=torch.float64)
        left, right = (torch.tensor(c).double() for c in gloo_pool(2).run(split_case, optimizer))
        assert torch.equal(left, right)
        torch.testing.assert_close(left[:, 0], expected[:, 0], rtol=1e-5, atol=0)
        torch.testing.assert_close(left[:, 1], expected[:, 1], rtol=1e-4, atol=0)
