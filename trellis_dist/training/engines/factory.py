"""From the training section to an engine."""

from __future__ import annotations

from torch import nn

from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.carry import RowStates
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine, EngineOptions

__all__ = ["build_engine", "check_engine", "uses_bf16"]


def check_engine(training: TrainingConfig) -> None:
    """Refuse what an engine can do on no mesh, before anything is started. Raises ``ValueError``.

    The same on every machine: bf16 at ZeRO 0 is refused on a CPU too, where bf16 would run as fp32.
    """
    if training.engine != "deepspeed":
        return
    if training.zero_stage == 3 and training.compile != "none":
        raise ValueError(
            f'training.zero_stage = 3 with training.compile = "{training.compile}": ZeRO 3 gathers weights '
            'inside a block, which no graph can hold: set training.compile = "none", or zero_stage = 1 or 2'
        )
    if training.zero_stage > 0:
        return
    if training.precision == "bf16":
        raise ValueError(
            'training.zero_stage = 0 with training.precision = "bf16" would train without fp32 master '
            'weights: use training.zero_stage = 1, or training.precision = "fp32"'
        )
    if training.offload_optimizer:
        raise ValueError(
            "training.zero_stage = 0 with training.offload_optimizer = true: DeepSpeed offloads what ZeRO "
            "divides: use training.zero_stage = 1, 2 or 3"
        )


def uses_bf16(training: TrainingConfig, mesh: Mesh) -> bool:
    """Tell whether weights and compute are bf16: asked for, and on a GPU (a CPU computes in fp32)."""
    return training.precision == "bf16" and mesh.device.type == "cuda"


def build_engine(
    model: nn.Module,
    training: TrainingConfig,
    *,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    segments: Segments,
    bf16: bool | None = None,
    states: RowStates | None = None,
) -> Engine:
    """Wrap ``model`` in its engine; ``segments`` is what ``apply_parallelism(model, mesh)`` returned.

    ``bf16`` holds where it is given, on a CPU too; otherwise ``uses_bf16`` decides. ``states`` are those that
    rows hand on, where they do. Raises ``ValueError`` as ``check_engine`` does.
    """
    check_engine(training)
    options = EngineOptions(
        optimizer=optimizer,
        mesh=mesh,
        segments=segments,
        bf16=uses_bf16(training, mesh) if bf16 is None else bf16,
        z_loss=training.z_loss,
        offload=training.offload_optimizer,
        forwards_first=training.forwards_first,
        persistence_threshold=training.zero3_persistence_threshold,
        states=states,
    )
    if training.engine == "local":
        from trellis_dist.training.engines.local import LocalEngine

        return LocalEngine(model, options)
    if training.engine == "fsdp2":
        from trellis_dist.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(model, options)
    from trellis_dist.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, options, zero_stage=training.zero_stage)
