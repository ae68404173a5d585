"""What a row of the parity matrix is: which mesh and engine, on which batch and model, against what.

Sizes are as small as the combinations allow: 4 heads serve tp 2 x sp 2 in all-to-all mode, and 64 tokens are
4 segments of two chunks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.loader import Batch
from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.parallel.config import SequenceMode
from trellis_dist.training.config import OptimizerConfig, TrainingConfig
from trellis_dist.training.parity.batches import Documents, global_batch

__all__ = [
    "BF16",
    "FEW_STEPS",
    "MODELS",
    "OPTIMIZERS",
    "ROW_TOKENS",
    "STEPS",
    "Case",
    "OperationCase",
    "Tolerance",
    "global_rows",
]

STEPS = 20
# Of rows that repeat another one with something added: an error shows in the first step, or after its update.
FEW_STEPS = 2
ROW_TOKENS = 64

ModelName = Literal["trellis", "hybrid"]
OptimizerName = Literal["sgd", "adamw"]

_TRELLIS = ModelConfig(
    vocab_size=40,
    num_layers=2,
    dim=32,
    num_heads=4,
    mlp_hidden=48,
    trellis=TrellisConfig(slots=8, chunk_size=8, learned_initial_memory=True),
    baselines=BaselineConfig(chunk_size=8),
)
# One recurrent baseline stands for all: what meshes and engines do with it is the same code for each, and
# tests/parallel/test_recurrent.py has every kind.
_HYBRID = dataclasses.replace(
    _TRELLIS, num_layers=3, pattern=("trellis", "attention", "gated_deltanet"), tie_embeddings=False
)
MODELS: dict[ModelName, ModelConfig] = {"trellis": _TRELLIS, "hybrid": _HYBRID}

# SGD without clipping shows an error in a gradient's scale, which Adam and clipping hide. At a rate of 0.5
# one process departs from itself within 20 steps when it sums in another order.
# Adam divides by the gradient's own size, so an eps near the rounding of a gradient would amplify that.
OPTIMIZERS: dict[OptimizerName, OptimizerConfig] = {
    "sgd": OptimizerConfig(kind="sgd", lr=0.02, weight_decay=0.0, clip_norm=0.0),
    "adamw": OptimizerConfig(kind="adamw", lr=1e-3, eps=1e-3, weight_decay=0.1, clip_norm=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative differences to one process.

    A gradient's and a weight's is in the L2 norm, over the norm of the whole parameter's.
    """

    loss: float = 1e-5
    norm: float = 1e-4
    gradient: float = 1e-4
    weight: float = 1e-5


# Of bf16 beside fp32 on this model: some three times what was seen. A factor of two, or a share missing from
# a sum, is far beyond it. A bias that starts at 0 is as far off as its gradients.
BF16 = Tolerance(loss=1e-3, norm=2e-2, gradient=0.25, weight=0.25)


@dataclass(frozen=True, kw_only=True)
class OperationCase:
    """State passing over ``sp`` ranks against ``compress_kv`` in one process: every bit."""

    sp: int

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"operation sp{self.sp}"

    def needs(self, world_size: int) -> str | None:
        """Why ``world_size`` ranks cannot run it; None: they can."""
        return _multiple(world_size, self.sp)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model trained for some steps; data parallelism fills the world that ``sp * tp`` leaves.

    Attributes:
        name: what reports call it.
        sp, tp, sequence_parallel, mode: the mesh.
        replicas: data-parallel ranks without which the row says nothing.
        engine, zero_stage, precision, activation_checkpointing, compile, offload_optimizer, forwards_first:
            as in ``TrainingConfig``; bf16 is compared with fp32.
        accumulation: micro-batches of a step.
        packed: documents start at multiples of the chunk size inside rows, and cross segments; otherwise
            every row is one document.
        carried: documents start anywhere, and rows go on from the states of the step before.
        model, optimizer: keys of ``MODELS`` and ``OPTIMIZERS``.
        steps: optimizer steps.
        same_bits_as: name of a case, run on the same ranks, whose losses, norms and gradients this one's must
            equal in every bit.
    """

    name: str
    sp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    mode: SequenceMode = "state_passing"
    replicas: int = 1
    engine: Literal["local", "deepspeed", "fsdp2"] = "local"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    offload_optimizer: bool = False
    forwards_first: int = 1
    accumulation: int = 1
    packed: bool = False
    carried: bool = False
    model: ModelName = "trellis"
    optimizer: OptimizerName = "sgd"
    steps: int = STEPS
    same_bits_as: str | None = None
    tolerance: Tolerance = Tolerance()

    @property
    def smallest_world(self) -> int:
        """Ranks of the smallest world that runs the row."""
        return self.replicas * self.sp * self.tp

    @property
    def row_tokens(self) -> int:
        """T: every segment has a chunk at least."""
        return max(ROW_TOKENS, self.sp * self.model_config.grain)

    def needs(self, world_size: int) -> str | None:
        """Why ``world_size`` ranks cannot run it; None: they can."""
        return _multiple(world_size, self.smallest_world)

    def global_batch(self, step: int, *, rows: int) -> Batch:
        """The batch of ``step``, ``rows`` rows."""
        vocab_size = self.model_config.vocab_size
        return global_batch(
            step, rows=rows, length=self.row_tokens, vocab_size=vocab_size, documents=self.documents
        )

    @property
    def documents(self) -> Documents:
        """Where documents start."""
        return "carried" if self.carried else "packed" if self.packed else "rows"

    @property
    def model_config(self) -> ModelConfig:
        """The model section."""
        return MODELS[self.model]

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer section."""
        return OPTIMIZERS[self.optimizer]

    def training_config(self, world_size: int) -> TrainingConfig:
        """The training section on ``world_size`` ranks."""
        rows, replicas = global_rows(world_size), world_size // (self.sp * self.tp)
        names = ["engine", "zero_stage", "precision", "activation_checkpointing", "compile"]
        names += ["offload_optimizer", "forwards_first"]
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        return TrainingConfig(
            steps=self.steps,
            global_batch_tokens=rows * self.row_tokens,
            micro_batch=rows // (replicas * self.accumulation),
            zero3_persistence_threshold=0,  # all parameters here are small, and must be divided
            **settings,
        )


def _multiple(world_size: int, ranks: int) -> str | None:
    if world_size >= ranks and world_size % ranks == 0:
        return None
    return f"needs {ranks} ranks or a multiple"


def global_rows(world_size: int) -> int:
    """Rows of a step: one number for all cases of a world, so that they share their references.

    Two for each replica of the purest data parallelism, and enough for four micro-batches of sp 2.
    """
    return max(8, 2 * world_size)
