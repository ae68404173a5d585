"""The rows of the parity matrix: which mesh and engine, on which batch and model, against what.

Sizes are as small as the combinations allow: 4 heads serve tp 2 x sp 2 in all-to-all mode, and 64 tokens are
4 segments of two chunks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.parallel.config import SequenceMode
from trellis_dist.training.config import OptimizerConfig, TrainingConfig

__all__ = [
    "CASES",
    "MODELS",
    "OPTIMIZERS",
    "ROW_TOKENS",
    "STEPS",
    "Case",
    "OperationCase",
    "Tolerance",
    "find_case",
    "global_rows",
]

STEPS = 20
# Of rows that repeat another one with something added: an error there shows in the first steps.
FEW_STEPS = 4
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
)
MODELS: dict[ModelName, ModelConfig] = {
    "trellis": _TRELLIS,
    "hybrid": dataclasses.replace(_TRELLIS, pattern=("trellis", "attention"), tie_embeddings=False),
}

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
        engine, zero_stage, activation_checkpointing, compile, offload_optimizer, forwards_first: as in
            ``TrainingConfig``.
        accumulation: micro-batches of a step.
        packed: documents start at multiples of the chunk size inside rows, and cross segments; otherwise
            every row is one document.
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
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    offload_optimizer: bool = False
    forwards_first: int = 1
    accumulation: int = 1
    packed: bool = False
    model: ModelName = "trellis"
    optimizer: OptimizerName = "sgd"
    steps: int = STEPS
    same_bits_as: str | None = None
    tolerance: Tolerance = Tolerance()

    @property
    def smallest_world(self) -> int:
        """Ranks of the smallest world that runs the row."""
        return self.replicas * self.sp * self.tp

    def needs(self, world_size: int) -> str | None:
        """Why ``world_size`` ranks cannot run it; None: they can."""
        return _multiple(world_size, self.smallest_world)

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
        names = ("engine", "zero_stage", "activation_checkpointing", "compile", "offload_optimizer")
        settings: dict[str, Any] = {name: getattr(self, name) for name in (*names, "forwards_first")}
        return TrainingConfig(
            steps=self.steps,
            global_batch_tokens=rows * ROW_TOKENS,
            micro_batch=rows // (replicas * self.accumulation),
            precision="fp32",
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


def find_case(name: str) -> Case | OperationCase:
    """The case called ``name``; ``KeyError`` when there is none."""
    return {case.name: case for case in CASES}[name]


def _local() -> list[Case]:
    """Plain torch: what the meshes themselves do."""
    return [
        Case(name="dp", replicas=2),
        Case(name="dp packed", replicas=2, packed=True),
        Case(name="sp2", sp=2),
        Case(name="sp2 packed", sp=2, packed=True),
        Case(name="sp4", sp=4),
        Case(name="sp4 packed", sp=4, packed=True),
        Case(name="sp2 all-to-all", sp=2, mode="all_to_all"),
        Case(name="sp2 all-to-all packed", sp=2, mode="all_to_all", packed=True),
        Case(name="sp2 attention", sp=2, model="hybrid", packed=True),
        Case(name="tp2", tp=2),
        Case(name="tp2 packed", tp=2, packed=True),
        Case(name="tp2 attention", tp=2, model="hybrid", packed=True),
        Case(name="tp2 sequence-parallel", tp=2, sequence_parallel=True),
        Case(name="tp2 sequence-parallel packed", tp=2, sequence_parallel=True, packed=True),
        Case(name="tp2 sp2", tp=2, sp=2),
        Case(name="tp2 sp2 packed", tp=2, sp=2, packed=True),
        Case(name="tp2 sp2 sequence-parallel", tp=2, sp=2, sequence_parallel=True, packed=True),
        Case(name="tp2 sp2 all-to-all", tp=2, sp=2, mode="all_to_all", packed=True),
        Case(
            name="tp2 sp2 all-to-all sequence-parallel",
            tp=2,
            sp=2,
            mode="all_to_all",
            sequence_parallel=True,
            model="hybrid",
            packed=True,
        ),
        Case(name="sp2 accumulation 4", sp=2, packed=True, accumulation=4),
        Case(name="sp2 adamw", sp=2, packed=True, optimizer="adamw"),
        Case(name="tp2 adamw", tp=2, sequence_parallel=True, packed=True, optimizer="adamw"),
    ]


def _variations() -> list[Case]:
    """What may change when and where something is computed, and nothing else."""
    full, selective = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
    sp: dict[str, Any] = {"sp": 2, "packed": True}
    tp: dict[str, Any] = {"tp": 2, "sequence_parallel": True, "packed": True}
    heads: dict[str, Any] = {**sp, "mode": "all_to_all"}
    compiled: dict[str, Any] = {"compile": "aot_eager"}
    ahead: dict[str, Any] = {"accumulation": 2, "forwards_first": 2}
    offload: dict[str, Any] = {"offload_optimizer": True, "optimizer": "adamw"}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("sp2 full checkpointing", {**sp, **full, "same_bits_as": "sp2 packed"}),
        ("sp2 selective checkpointing", {**sp, **selective, "same_bits_as": "sp2 packed"}),
        ("tp2 full checkpointing", {**tp, **full, "same_bits_as": "tp2 sequence-parallel packed"}),
        ("tp2 selective checkpointing", {**tp, **selective, "same_bits_as": "tp2 sequence-parallel packed"}),
        ("sp2 all-to-all full checkpointing", {**heads, **full, "same_bits_as": "sp2 all-to-all packed"}),
        (
            "sp2 all-to-all selective checkpointing",
            {**heads, **selective, "same_bits_as": "sp2 all-to-all packed"},
        ),
        ("sp2 forwards first", {**sp, "accumulation": 4, "forwards_first": 4}),
        ("sp2 forwards first full checkpointing", {**sp, **full, "accumulation": 4, "forwards_first": 2}),
        ("sp2 offload", {**sp, **offload}),
        ("sp2 all-to-all offload", {**heads, **offload, **full, "model": "hybrid"}),
        ("tp2 offload", {**tp, **offload, **full, **ahead, "model": "hybrid"}),
        ("dp compile", {"replicas": 2, "packed": True, **compiled}),
        ("sp2 compile", {**sp, **compiled}),
        ("sp2 all-to-all compile", {**heads, **compiled, "model": "hybrid"}),
        ("tp2 compile", {**tp, **compiled}),
        ("tp2 compile full checkpointing", {**tp, **compiled, **full}),
        ("sp2 compile selective checkpointing", {**sp, **compiled, **selective, **ahead}),
    ]
    return [Case(name=name, steps=FEW_STEPS, **settings) for name, settings in rows]


def _sharded() -> list[Case]:
    """Engines that divide state over data-parallel ranks."""
    zero: dict[str, Any] = {"engine": "deepspeed"}
    fsdp: dict[str, Any] = {"engine": "fsdp2"}
    dp: dict[str, Any] = {"replicas": 2, "packed": True}
    sp: dict[str, Any] = {**dp, "sp": 2}
    tp: dict[str, Any] = {**dp, "tp": 2}
    rows: list[tuple[str, dict[str, Any]]] = [
        *((f"zero{stage} dp", {**zero, **dp, "zero_stage": stage}) for stage in range(4)),
        ("zero1 dp sp2", {**zero, **sp}),
        ("zero1 dp tp2", {**zero, **tp}),
        ("fsdp2 dp", {**fsdp, **dp}),
        ("fsdp2 dp sp2", {**fsdp, **sp}),
        (
            "zero1 dp sp2 tp2",
            {**zero, **sp, "tp": 2, "accumulation": 2, "activation_checkpointing": "full"},
        ),
    ]
    return [Case(name=name, **settings) for name, settings in rows]


def _sharded_variations() -> list[Case]:
    """The same engines with what else a run may ask of them, several things at once."""
    zero: dict[str, Any] = {"engine": "deepspeed", "packed": True}
    dp: dict[str, Any] = {"replicas": 2}
    sp: dict[str, Any] = {"replicas": 2, "sp": 2}
    tp: dict[str, Any] = {"replicas": 2, "tp": 2, "sequence_parallel": True}
    adam: dict[str, Any] = {"optimizer": "adamw"}
    full: dict[str, Any] = {"activation_checkpointing": "full"}
    ahead: dict[str, Any] = {"accumulation": 2, "forwards_first": 2}
    selective: dict[str, Any] = {"activation_checkpointing": "selective"}
    compiled: dict[str, Any] = {"compile": "aot_eager"}
    hybrid: dict[str, Any] = {"model": "hybrid"}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("zero1 sp2", {**zero, "sp": 2}),
        ("zero1 dp accumulation 2", {**zero, **dp, "accumulation": 2}),
        ("zero1 tp2 sequence-parallel", {**zero, "tp": 2, "sequence_parallel": True}),
    ]
    engines = [(f"zero{stage}", {**zero, "zero_stage": stage}) for stage in range(4)]
    for name, engine in [*engines, ("fsdp2", {"engine": "fsdp2", "packed": True})]:
        # ZeRO 0 divides nothing that could be offloaded; ZeRO 3 calls hooks inside a block that no graph may
        # hold. Both are refused.
        offload = {} if name == "zero0" else {"offload_optimizer": True}
        graphs = {} if name == "zero3" else compiled
        more = f"selective checkpointing{' compile' * bool(graphs)}{' offload' * bool(offload)}"
        rows += [
            (f"{name} dp adamw", {**engine, **dp, **adam}),
            (f"{name} dp forwards first full checkpointing", {**engine, **dp, **ahead, **full}),
            (
                f"{name} dp {more}",
                {**engine, **dp, **adam, **ahead, **hybrid, **selective, **graphs, **offload},
            ),
            *([] if name in ("zero1", "fsdp2") else [(f"{name} dp sp2", {**engine, **sp})]),
            (f"{name} dp sp2 adamw", {**engine, **sp, **adam, "accumulation": 2}),
            (f"{name} dp sp2 all-to-all", {**engine, **sp, **ahead, **full, **hybrid, "mode": "all_to_all"}),
            *([] if name == "zero1" else [(f"{name} dp tp2", {**engine, **tp, **hybrid})]),
            (f"{name} dp tp2 adamw", {**engine, **tp, **adam, **ahead, **full}),
        ]
    return [Case(name=name, steps=FEW_STEPS, **settings) for name, settings in rows]


CASES: tuple[Case | OperationCase, ...] = (
    OperationCase(sp=2),
    OperationCase(sp=4),
    *_local(),
    *_variations(),
    *_sharded(),
    *_sharded_variations(),
)
