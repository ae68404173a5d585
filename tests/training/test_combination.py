"""What may start is what the parity matrix covers: its rows pass the check, the rest is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.combination import check_combination
from trellis_dist.training.parity.cases import CASES, ROW_TOKENS, Case, global_rows

ROWS = [case for case in CASES if isinstance(case, Case)]


def check(case: Case, **changes: Any) -> MeshConfig:
    world = case.smallest_world
    settings: dict[str, Any] = {
        "mesh": MeshConfig(sp=case.sp, tp=case.tp),
        "tensor": TensorConfig(sequence_parallel=case.sequence_parallel),
        "sequence": SequenceConfig(mode=case.mode),
        "model": case.model_config,
        "data": DataConfig(directory="none", sequence_length=ROW_TOKENS, packing="aligned"),
        "training": case.training_config(world),
        "global_rows": global_rows(world),
        "world_size": world,
    }
    return check_combination(**{**settings, **changes})


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_every_row_of_the_matrix_may_start(case: Case):
    assert check(case).dp == case.replicas


def covered(**features: Any) -> bool:
    """Whether some row has all these features."""
    return any(all(getattr(row, key) == value for key, value in features.items()) for row in ROWS)


def test_a_graph_around_gathered_weights_is_refused():
    settings: dict[str, Any] = {"engine": "deepspeed", "zero_stage": 3, "compile": "aot_eager"}
    assert not covered(**settings), "a row covers it: allow it"
    row = next(row for row in ROWS if row.name == "dp")
    asked = dataclasses.replace(row.training_config(2), **settings)
    with pytest.raises(ValueError, match=r'set training\.compile = "none"') as refused:
        check(row, training=asked)
    assert "\n" not in str(refused.value)


def test_segments_of_rows_that_start_documents_anywhere_are_refused():
    row = next(row for row in ROWS if row.sp == 2)
    data = DataConfig(directory="none", sequence_length=ROW_TOKENS, packing="concat")
    with pytest.raises(ValueError, match=r'set data\.packing = "aligned" or mesh\.sp = 1'):
        check(row, data=data)


def test_state_without_masters_is_refused():
    row = next(row for row in ROWS if row.name == "zero0 dp")
    half = dataclasses.replace(row.training_config(2), precision="bf16")
    with pytest.raises(ValueError, match="without fp32 master"):
        check(row, training=half)
