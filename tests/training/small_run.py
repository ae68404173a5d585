"""A data set made by hand and a job that trains on it in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.hand_made import random_splits
from checkpoints.config import CheckpointConfig
from checkpoints.state import CheckpointReader
from data_pipeline.config import DataConfig
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.training.config import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from trellis_dist.training.job import Job
from trellis_dist.training.metrics import read_rows

VOCAB, ROW = 17, 16
# What two runs must agree on; speeds and times they need not.
EXACT = (
    "step",
    "tokens",
    "loss/train",
    "loss/validation",
    "validation/bits_per_byte",
    "optim/lr",
    "optim/gradient_norm",
)


def write_dataset(folder: Path, *, seed: int = 0, vocab: int = VOCAB) -> Path:
    """Documents of very different lengths, so that the valid tokens of micro-batches differ."""
    return random_splits(folder, seed=seed, vocab_size=vocab, lengths=(1, 2, 3, 40))


def make_job(data: Path, **changes: Any) -> Job:
    """20 steps of 4 rows on the local engine; ``changes`` maps a section to the fields to change."""
    job = Job(
        model=ModelConfig(
            vocab_size=VOCAB,
            num_layers=1,
            dim=16,
            num_heads=2,
            mlp_hidden=24,
            trellis=TrellisConfig(slots=4, chunk_size=8),
        ),
        mesh=MeshConfig(),
        data=DataConfig(directory=str(data), sequence_length=ROW),
        optimizer=OptimizerConfig(lr=0.01, eps=1e-4),
        schedule=ScheduleConfig(warmup_steps=4),
        training=TrainingConfig(
            steps=20,
            global_batch_tokens=4 * ROW,
            micro_batch=2,
            engine="local",
            precision="fp32",
            validation_interval=10,
            threads=1,
            first_step_timeout_s=0,
            step_timeout_s=0,
        ),
        checkpoint=CheckpointConfig(interval=5, keep=0),
        logging=LoggingConfig(interval=1, tensorboard=False, progress=False),
        recipe={"name": "small", "model": {}, "data": {"directory": str(data)}},
    )
    sections = {name: dataclasses.replace(getattr(job, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(job, **sections)


def exact_rows(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run without times and speeds."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{key: row[key] for key in EXACT if key in row} for row in rows]


def state(run_dir: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as bytes."""
    reader = CheckpointReader(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: reader.read(name).numpy().tobytes() for name in reader.names()}
