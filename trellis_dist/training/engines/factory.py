"""From the training section to an engine; combinations that no parity test covers are refused here."""

from __future__ import annotations

from torch import nn

from trellis_dist.parallel.mesh import Mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine

__all__ = ["build_engine", "check_engine", "uses_bf16"]


def check_engine(training: TrainingConfig, *, dp: int, sp: int) -> None:
    """Refuse an engine that cannot run a mesh, before anything is started. Raises ``ValueError``.

    The same on every machine: bf16 at ZeRO 0 is refused on a CPU too, where bf16 would run as fp32.
    """
    if training.engine == "local" and dp > 1:
        raise ValueError(
            f'training.engine = "local" trains one replica, but mesh.dp = {dp}: use engine = "deepspeed", or '
            "start fewer ranks"
        )
    if training.engine == "deepspeed" and sp > 1:
        raise ValueError(
            f'training.engine = "deepspeed" with mesh.sp = {sp}: no parity test covers ZeRO over sequence '
            'segments yet: use engine = "local" (mesh.dp = 1), or mesh.sp = 1'
        )
    if training.engine == "deepspeed" and training.precision == "bf16" and training.zero_stage == 0:
        raise ValueError(
            'training.zero_stage = 0 with training.precision = "bf16" would train without fp32 master '
            'weights: use training.zero_stage = 1, or training.precision = "fp32"'
        )


def uses_bf16(training: TrainingConfig, mesh: Mesh) -> bool:
    """Tell whether weights and compute are bf16: asked for, and on a GPU (a CPU computes in fp32)."""
    return training.precision == "bf16" and mesh.device.type == "cuda"


def build_engine(
    model: nn.Module, training: TrainingConfig, *, optimizer: OptimizerConfig, mesh: Mesh, segments: Segments
) -> Engine:
    """Wrap ``model`` in its engine; ``segments`` is what ``apply_parallelism(model, mesh)`` returned.

    Raises ``ValueError`` as ``check_engine`` does.
    """
    check_engine(training, dp=mesh.dp, sp=mesh.sp)
    bf16 = uses_bf16(training, mesh)
    if training.engine == "local":
        from trellis_dist.training.engines.local import LocalEngine

        return LocalEngine(
            model,
            optimizer=optimizer,
            device=mesh.device,
            bf16=bf16,
            z_loss=training.z_loss,
            mesh=mesh,
            segments=segments,
        )
    from trellis_dist.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        optimizer=optimizer,
        device=mesh.device,
        zero_stage=training.zero_stage,
        bf16=bf16,
        z_loss=training.z_loss,
    )
