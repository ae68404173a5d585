"""What may start is what the parity matrix covers: its rows pass the check, the rest is refused."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.combination import check_combination
from trellis_dist.training.parity import coverage
from trellis_dist.training.parity.cases import ROW_TOKENS, Case, global_rows
from trellis_dist.training.parity.coverage import row_features
from trellis_dist.training.parity.rows import CASES, find_case

ROWS = [case for case in CASES if isinstance(case, Case)]


def check(case: Case, **changes: Any) -> MeshConfig:
    world = case.smallest_world
    settings: dict[str, Any] = {
        "mesh": MeshConfig(sp=case.sp, tp=case.tp),
        "tensor": TensorConfig(sequence_parallel=case.sequence_parallel),
        "sequence": SequenceConfig(mode=case.mode),
        "model": case.model_config,
        "data": DataConfig(
            directory="none",
            sequence_length=ROW_TOKENS,
            chunk_aligned=True,
            carry_rows=3 if case.carried else 1,
        ),
        "training": case.training_config(world),
        "global_rows": global_rows(world),
        "world_size": world,
    }
    return check_combination(**{**settings, **changes})


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_every_row_of_the_matrix_may_start(case: Case):
    assert check(case).dp == case.replicas


# Engines by what they cannot do, and everything else that a run may ask for beside its engine.
CANNOT: dict[str, set[str]] = {
    "local": set(),
    "zero0": {"bf16", "offload"},
    "zero1": set(),
    "zero2": set(),
    "zero3": {"compile"},
    "fsdp2": set(),
}
FEATURES: dict[str, dict[str, Any]] = {
    "dp": {"replicas": 2},
    "state passing": {"sp": 2, "mode": "state_passing"},
    "all-to-all": {"sp": 2, "mode": "all_to_all"},
    "tp": {"tp": 2, "sequence_parallel": False},
    "tp, sequence-parallel": {"tp": 2, "sequence_parallel": True},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "compile": {"compile": "aot_eager"},
    "offload": {"offload_optimizer": True},
    "accumulation": {"accumulation": 2},
    "forwards first": {"forwards_first": 2, "accumulation": 2},
    "attention": {"model": "hybrid"},
    "bf16": {"precision": "bf16"},
    "carried": {"carried": True},
}
# What no engine can do, and why.
NEVER = {
    ("state passing", "carried"): r"mesh\.sp = 2: the last segment",
    ("all-to-all", "carried"): r"mesh\.sp = 2: the last segment",
    ("compile", "carried"): "which no graph holds",
    ("attention", "carried"): "only trellis layers hand a state",
}


def asked(engine: str, *names: str) -> Case | None:
    """A run with these features; None where one excludes another."""
    settings: dict[str, Any] = {"engine": engine}
    if engine.startswith("zero"):
        settings = {"engine": "deepspeed", "zero_stage": int(engine[-1])}
    for name in names:
        if any(settings.get(key, value) != value for key, value in FEATURES[name].items()):
            return None
        settings |= FEATURES[name]
    return Case(name="asked", **settings)


@pytest.mark.parametrize("engine", CANNOT)
def test_an_engine_starts_with_any_two_features_but_what_it_cannot_do(engine: str):
    for names in itertools.combinations(FEATURES, 2):
        case = asked(engine, *names)
        if case is None:
            continue
        if names in NEVER or CANNOT[engine] & set(names):
            reason = NEVER.get(names, r"training\.zero_stage = [03]")
            with pytest.raises(ValueError, match=reason) as refused:
                check(case)
            assert "\n" not in str(refused.value)
        else:
            check(case)


def test_what_a_row_covers_is_what_its_name_says():
    row = find_case("local, dp, tp2, full, compile, offload, ahead, attention")
    assert isinstance(row, Case)
    engine, features = row_features(row)
    assert engine == 'training.engine = "local"'
    assert features == {
        "mesh.dp > 1",
        "mesh.tp > 1",
        'training.activation_checkpointing = "full"',
        "training.compile",
        "training.offload_optimizer = true",
        "training.forwards_first > 1",
        "accumulation",
        "attention layers",
        "recurrent baseline layers",
    }


def test_two_features_that_no_row_brings_together_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Without the rows that have both, FSDP2 may not start with offload on segments, but with either."""

    def kept(row: Case) -> bool:
        return not (
            row.engine == "fsdp2" and row.mode == "state_passing" and row.sp > 1 and row.offload_optimizer
        )

    monkeypatch.setattr(coverage, "CASES", tuple(row for row in ROWS if kept(row)))
    coverage._met.cache_clear()
    with pytest.raises(
        ValueError, match=r"no row .* \"fsdp2\", mesh\.sp > 1 .* and training\.offload_opt"
    ) as refused:
        check(asked("fsdp2", "state passing", "offload"))
    assert "\n" not in str(refused.value)
    check(asked("fsdp2", "state passing"))
    check(asked("fsdp2", "offload"))
    monkeypatch.undo()
    coverage._met.cache_clear()
    check(asked("fsdp2", "state passing", "offload"))


def test_segments_of_rows_that_start_documents_anywhere_are_refused():
    row = next(row for row in ROWS if row.sp == 2)
    data = DataConfig(directory="none", sequence_length=ROW_TOKENS, packing="best_fit")
    with pytest.raises(ValueError, match=r"set data\.chunk_aligned = true or mesh\.sp = 1"):
        check(row, data=data)


def test_rows_of_broken_chunks_are_refused_where_documents_are_aligned():
    row = next(row for row in ROWS if row.sp == 1)
    data = DataConfig(directory="none", sequence_length=ROW_TOKENS + 1, chunk_aligned=True)
    with pytest.raises(ValueError, match=rf"sequence_length = {ROW_TOKENS + 1} is no multiple .*: use "):
        check(row, data=data)


def test_state_without_masters_is_refused():
    row = next(row for row in ROWS if row.name == "zero0 dp")
    half = dataclasses.replace(row.training_config(2), precision="bf16")
    with pytest.raises(ValueError, match="without fp32 master"):
        check(row, training=half)
