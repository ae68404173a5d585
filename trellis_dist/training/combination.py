"""What the sections of a run must agree on before a process group is made; what no test covers is refused."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.rows import check_alignment
from trellis_dist.models.config import ModelConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.parallel.mesh import check_mesh
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.engines.factory import check_engine
from trellis_dist.training.parity.coverage import engine_of, features, uncovered

__all__ = ["check_combination"]


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
    if mesh.sp > 1 and not data.chunk_aligned:
        raise ValueError(
            f"mesh.sp = {mesh.sp} cuts rows at multiples of the chunk size, and with data.chunk_aligned = "
            "false documents start anywhere, so a cut would fall inside a chunk: set data.chunk_aligned = "
            "true or mesh.sp = 1"
        )
    filled = check_mesh(
        mesh,
        tensor=tensor,
        sequence=sequence,
        world_size=world_size,
        sequence_length=data.sequence_length,
        chunk_size=model.grain,
        num_heads=model.num_heads,
        vocab_size=model.vocab_size,
        mlp_hidden=model.mlp_width,
        global_rows=global_rows,
        micro_batch=training.micro_batch,
        conv_kernel=model.conv_kernel,
        pattern=model.pattern,
    )
    if data.carry_rows > 1:
        _check_carried(filled, model, data, training)
    if data.chunk_aligned:
        check_alignment(data.sequence_length, model.grain)
    check_engine(training)
    asked = features(
        mesh=filled,
        tensor=tensor,
        sequence=sequence,
        model=model,
        training=training,
        global_rows=global_rows,
        carried=data.carry_rows > 1,
    )
    for together in uncovered(engine_of(training), asked):
        raise ValueError(f"no row of the parity matrix has {together} together: change one of them")
    return filled


def _check_carried(mesh: MeshConfig, model: ModelConfig, data: DataConfig, training: TrainingConfig) -> None:
    """Refuse what cannot hand states from row to row, with the reason."""
    asked = f"data.carry_rows = {data.carry_rows}"
    if mesh.sp > 1:
        raise ValueError(
            f"{asked} with mesh.sp = {mesh.sp}: the last segment of a row would have to hand its states to "
            "the first one before its next step could begin; set data.carry_rows = 1, or mesh.sp = 1"
        )
    if set(model.pattern) != {"trellis"}:
        raise ValueError(
            f"{asked} with model.pattern = {list(model.pattern)}: only trellis layers hand a state of fixed "
            "size from row to row; set data.carry_rows = 1, or use trellis layers alone"
        )
    if training.compile != "none":
        raise ValueError(
            f'{asked} with training.compile = "{training.compile}": states leave the layers beside their '
            'outputs, which no graph holds; set data.carry_rows = 1, or training.compile = "none"'
        )
