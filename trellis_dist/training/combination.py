"""What the sections of a run must agree on before a process group is made; what no test covers is refused."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.config import DataConfig
from trellis_dist.models.config import ModelConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.parallel.mesh import check_mesh
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.engines.factory import check_engine

__all__ = ["check_combination", "uncovered"]


def check_combination(
    *,
    mesh: MeshConfig,
    tensor: TensorConfig,
    sequence: SequenceConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    global_rows: int,
    world_size: int,
) -> MeshConfig:
    """The mesh with ``dp`` filled in from ``world_size`` ranks; ``global_rows`` make one optimizer step.

    Raises:
        ValueError: the mesh, the packing or the engine on it cannot work, or no row of the parity matrix
            covers them together; the arithmetic or the reason is in the message.
    """
    if mesh.sp > 1 and data.packing == "concat":
        raise ValueError(
            f"mesh.sp = {mesh.sp} cuts rows at multiples of the chunk size, and data.packing = "
            '"concat" starts documents anywhere, so a cut would fall inside a chunk: set data.packing = '
            '"aligned" or mesh.sp = 1'
        )
    filled = check_mesh(
        mesh,
        tensor=tensor,
        sequence=sequence,
        world_size=world_size,
        sequence_length=data.sequence_length,
        chunk_size=model.trellis.chunk_size,
        num_heads=model.num_heads,
        vocab_size=model.vocab_size,
        mlp_hidden=model.mlp_width,
        global_rows=global_rows,
        micro_batch=training.micro_batch,
        conv_kernel=model.trellis.conv_kernel,
        pattern=model.pattern,
    )
    check_engine(training)
    for reason in uncovered(filled, training=training):
        raise ValueError(reason)
    return filled


def uncovered(mesh: MeshConfig, *, training: TrainingConfig) -> Iterator[str]:
    """Why no row of the parity matrix covers this run, one line each; nothing when one does.

    Support is a property of the features that meet, not of their sizes: a row with sp 2 covers sp 8.
    """
    stage, engine = training.zero_stage, training.engine
    if engine == "deepspeed" and stage != 1 and mesh.tp > 1:
        yield (
            f"training.zero_stage = {stage} with mesh.tp = {mesh.tp}: only ZeRO 1 is tested over tensor "
            "shards: set training.zero_stage = 1"
        )
    if engine == "deepspeed" and stage == 3 and training.compile != "none":
        yield (
            f'training.zero_stage = 3 with training.compile = "{training.compile}": ZeRO 3 gathers weights '
            'inside a block, which no graph can hold: set training.compile = "none", or zero_stage = 1 or 2'
        )
    if engine == "fsdp2" and mesh.tp > 1:
        yield (
            f'training.engine = "fsdp2" with mesh.tp = {mesh.tp}: no test covers FSDP2 over tensor shards: '
            'use engine = "deepspeed" with zero_stage = 1, or mesh.tp = 1'
        )
