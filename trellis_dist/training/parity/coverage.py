"""What the rows of the matrix put together, and so what a run may put together.

Coverage is a property of the features that meet, not of their sizes: a row with sp 2 covers sp 8. A run may
start when its engine meets every two of its other features in some row; for compilation any engine's row will
do, where its own has met compilation at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

from trellis_dist.models.baseline_config import BASELINES
from trellis_dist.models.config import ATTENTION_KINDS, ModelConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.config import TrainingConfig
from trellis_dist.training.parity.cases import Case
from trellis_dist.training.parity.rows import CASES

__all__ = ["engine_of", "features", "row_features", "uncovered"]

Features = frozenset[str]
Pair = tuple[str, str]

# Graphs are made of the model's blocks, whatever the engine: what they meet, they meet for all engines.
_COMPILE = "training.compile"


def engine_of(training: TrainingConfig) -> str:
    """The engine, as a recipe says it."""
    stage = f" with zero_stage = {training.zero_stage}" if training.engine == "deepspeed" else ""
    return f'training.engine = "{training.engine}"{stage}'


def features(
    *,
    mesh: MeshConfig,
    tensor: TensorConfig,
    sequence: SequenceConfig,
    model: ModelConfig,
    training: TrainingConfig,
    global_rows: int,
    carried: bool = False,
) -> Features:
    """What a run asks for beside its engine, as a recipe says it; ``mesh.dp`` is filled in."""
    assert mesh.dp is not None, "features are those of a filled mesh"
    checkpointing, kinds = training.activation_checkpointing, set(model.pattern)
    asked = {
        "mesh.dp > 1": mesh.dp > 1,
        f'mesh.sp > 1 with sequence.mode = "{sequence.mode}"': mesh.sp > 1,
        "mesh.tp > 1": mesh.tp > 1 and not tensor.sequence_parallel,
        "mesh.tp > 1 with tensor.sequence_parallel = true": mesh.tp > 1 and tensor.sequence_parallel,
        "attention layers": not kinds.isdisjoint(ATTENTION_KINDS),
        "recurrent baseline layers": not kinds.isdisjoint(BASELINES),
        'training.precision = "bf16"': training.precision == "bf16",
        f'training.activation_checkpointing = "{checkpointing}"': checkpointing != "none",
        _COMPILE: training.compile != "none",
        "training.offload_optimizer = true": training.offload_optimizer,
        "accumulation": global_rows > training.micro_batch * mesh.dp,
        "training.forwards_first > 1": training.forwards_first > 1,
        "data.carry_rows > 1": carried,
    }
    return frozenset(words for words, wanted in asked.items() if wanted)


def uncovered(engine: str, asked: Features) -> Iterator[str]:
    """Each one or two of the features ``asked`` that no row has with ``engine``, as one line."""
    met = _met(engine)
    missing = {pair for pair in itertools.combinations_with_replacement(sorted(asked), 2) if pair not in met}
    alone = {first for first, second in missing if first == second}
    yield from (f"{engine} and {feature}" for feature in sorted(alone))
    yield from (f"{engine}, {a} and {b}" for a, b in sorted(missing) if not alone & {a, b})


@functools.cache
def _met(engine: str) -> frozenset[Pair]:
    rows = [row_features(case) for case in CASES if isinstance(case, Case)]
    everywhere = _pairs(row for _, row in rows)
    graphs = {pair for pair in everywhere if _COMPILE in pair and pair != (_COMPILE, _COMPILE)}
    return _pairs(row for name, row in rows if name == engine) | graphs


def _pairs(rows: Iterable[Features]) -> frozenset[Pair]:
    """Each feature with itself and with each other one that it meets, in order."""
    return frozenset(pair for row in rows for pair in itertools.combinations_with_replacement(sorted(row), 2))


def row_features(case: Case) -> tuple[str, Features]:
    """Engine and features of a row, on the smallest world that runs it."""
    training = case.training_config(case.smallest_world)
    found = features(
        mesh=MeshConfig(dp=case.replicas, sp=case.sp, tp=case.tp),
        tensor=TensorConfig(sequence_parallel=case.sequence_parallel),
        sequence=SequenceConfig(mode=case.mode),
        model=case.model_config,
        training=training,
        global_rows=training.global_batch_tokens // case.row_tokens,
        carried=case.carried,
    )
    return engine_of(training), found
