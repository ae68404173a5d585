"""What a training run is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoints.config import CheckpointConfig
from data_pipeline.config import DataConfig
from trellis_dist.models.config import ModelConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.config import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig

__all__ = ["EXIT_TERMINATED", "Job", "Outcome", "Resume", "TrainResult"]

Resume = Literal["auto", "require"]
Outcome = Literal["finished", "stopped", "terminated"]

# EX_TEMPFAIL of sysexits.h: try again later. A scheduler that requeues on this status resumes the run.
EXIT_TERMINATED = 75


@dataclass(frozen=True, kw_only=True)
class Job:
    """The sections of a recipe that training reads.

    Attributes:
        model, mesh, tensor, sequence, data, optimizer, schedule, training, checkpoint, logging: the rooms'
            sections.
        recipe: the whole resolved recipe, written to ``recipe.json`` for the record.
        changed: dotted key -> default, of the values in ``recipe`` that differ from it; said at the start.
    """

    model: ModelConfig
    mesh: MeshConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    recipe: Mapping[str, Any]
    tensor: TensorConfig = field(default_factory=TensorConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def global_rows(self) -> int:
        """Rows per optimizer step over the whole mesh; ``ValueError`` when the batch is no whole number."""
        tokens, length = self.training.global_batch_tokens, self.data.sequence_length
        if tokens % length:
            raise ValueError(
                f"training.global_batch_tokens = {tokens} is no multiple of data.sequence_length = {length}: "
                f"use {max(1, round(tokens / length)) * length}"
            )
        return tokens // length


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a run stands when ``run`` returns.

    Attributes:
        outcome: "finished" (all steps done), "stopped" (at ``stop_at_step``), "terminated" (SIGTERM; saved).
        step, tokens: done so far, earlier starts included.
        resumed_step: where this start began; 0 for a new run.
        loss: of the last step of this start (nats per token); None when there was no step to do.
        validation: metrics of the last validation pass.
        seconds: wall time of this start.
        seconds_to_first_loss: from the start to the first loss; None when there was no step to do.
    """

    outcome: Outcome
    step: int
    tokens: int
    resumed_step: int
    loss: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_to_first_loss: float | None = None

    @property
    def exit_status(self) -> int:
        """Exit status for a process: 75 (try again later) after SIGTERM, else 0."""
        return EXIT_TERMINATED if self.outcome == "terminated" else 0
