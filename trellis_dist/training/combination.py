"""What the sections of a run must agree on before a process group is made; what no test covers is refused."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from trellis_dist.models.config import ModelConfig
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import check_mesh
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.engines.factory import check_engine

__all__ = ["check_combination"]


def check_combination(
    *,
    mesh: MeshConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    global_rows: int,
    world_size: int,
) -> MeshConfig:
    """The mesh with ``dp`` filled in from ``world_size`` ranks; ``global_rows`` make one optimizer step.

    Raises:
        ValueError: the mesh, the packing or the engine on it cannot work; the arithmetic is in the message.
    """
    if mesh.sp > 1 and data.packing == "concat":
        raise ValueError(
            f"mesh.sp = {mesh.sp} cuts rows at multiples of the chunk size, and data.packing = "
            '"concat" starts documents anywhere, so a cut would fall inside a chunk: set data.packing = '
            '"aligned" or mesh.sp = 1'
        )
    filled = check_mesh(
        mesh,
        world_size=world_size,
        sequence_length=data.sequence_length,
        chunk_size=model.trellis.chunk_size,
        num_heads=model.num_heads,
        vocab_size=model.vocab_size,
        global_rows=global_rows,
        micro_batch=training.micro_batch,
        conv_kernel=model.trellis.conv_kernel,
        pattern=model.pattern,
    )
    check_engine(training, dp=filled.dp or 1, sp=filled.sp)
    return filled
