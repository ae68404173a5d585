"""The parity matrix: every mesh and engine trains as one process does, and would show it if it did not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import gloo_pool
from tests.training.parity_cases import (
    FAULTS,
    run_case,
    run_eight,
    run_order,
    run_order_with_fault,
    run_variant,
    run_with_fault,
)
from trellis_dist.training.parity.cases import STEPS, Case, OperationCase
from trellis_dist.training.parity.compare import CaseResult, Failure
from trellis_dist.training.parity.rows import CASES

# Of one case: the first of a pool imports DeepSpeed and megatron-core and makes process groups.
CASE_TIMEOUT_S = 150.0
# Rows that fit two ranks and mean more where data parallelism fills four.
ALSO_ON_FOUR = (
    "sp2 packed",
    "sp2 all-to-all packed",
    "tp2 sequence-parallel packed",
)
EIGHT, EIGHT_STEPS = "zero1 dp sp2 tp2", 4


def smallest(case: Case | OperationCase) -> int:
    return case.sp if isinstance(case, OperationCase) else case.smallest_world


ROWS = [(smallest(case), case.name) for case in CASES if case.name != EIGHT]
ROWS += [(4, name) for name in ALSO_ON_FOUR]


def run_on(world: int, function: Any, *args: Any) -> list[Any]:
    """Results by rank; after an error the pool is not used again, its connections may be broken."""
    pool = gloo_pool(world)
    try:
        return pool.run(function, *args, timeout_s=CASE_TIMEOUT_S)
    except BaseException:
        pool.close()
        raise


def describe(result: CaseResult) -> str:
    return "\n".join(failure.line() for failure in result.failures[:5])


@pytest.mark.parametrize("world, name", sorted(ROWS), ids=lambda value: str(value))
def test_a_row_is_one_process(world: int, name: str) -> None:
    found = run_on(world, run_case, name, STEPS)
    assert found[0].passed, describe(found[0])
    assert found[0].worst, "nothing was compared"
    assert all(result == found[0] for result in found)


def test_eight_ranks_are_one_process() -> None:
    """All three axes together, and segments over all ranks; eight share two cores, so once and few steps."""
    try:
        (results, *_) = run_on(8, run_eight, EIGHT, EIGHT_STEPS)
    finally:
        gloo_pool(8).close()
    assert [result.name for result in results] == [EIGHT, "operation sp8", "sp8 packed"]
    for result in results:
        assert result.passed, describe(result)


# Every option of a delta rule from keys to values at once.
TIED = {
    "update": "corrected",
    "readout": "silu",
    "head_norm_eps": 0.05,
    "step_bound": "token",
    "step_size_max": 1.0,
    "gate_form": "rate",
    "value_gates": "own",
    "value_gate_bias": 8.0,
    "value_step_size_bias": -4.0,
    "initial_value_memory": "identity",
    "targets": "values",
    "alpha_norm": "none",
    "conv_values": True,
    "skip_values": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {"conv_kernel": 0, "gates": ("off", "fixed")},
        {"phi": "tanh", "readout": "softmax", "alpha_norm": "none"},
        {
            "update": "corrected",
            "phi": "tanh",
            "readout": "silu_rms",
            "value_gates": "own",
            "step_bound": "token",
            "step_size_max": 1.0,
        },
        TIED,
    ],
    ids=["no-convolution", "tanh", "corrected", "tied"],
)
def test_other_layers_over_four_segments_are_one_process(change: dict[str, Any]) -> None:
    result = run_on(4, run_variant, change, "sp4 packed")[0]
    assert result.passed, describe(result)


def test_heads_of_a_skip_and_of_values_as_targets_are_split_with_the_others() -> None:
    result = run_on(4, run_variant, TIED, "tp2 sp2 packed")[0]
    assert result.passed, describe(result)


# (ranks, row, what is wrong, what must show it)
NEGATIVE = [
    (2, "tp2 sequence-parallel packed", "no sum over tp", "gradient/norm.weight"),
    (2, "zero1 tp2 sequence-parallel", "no hooks over tp", "gradient/norm.weight"),
    (2, "sp2 packed", "no sum over dp x sp", "gradient/embedding_weight"),
    (2, "dp packed", "no sum over dp x sp", "gradient/embedding_weight"),
    (4, "fsdp2 dp sp2", "no sum over sp", "gradient/embedding_weight"),
    (2, "dp packed", "a mean per replica", "gradient norm"),
    (2, "zero1 dp", "a mean per replica", "gradient norm"),
    (2, "sp2", "labels shifted per segment", "loss"),
    (2, "tp2 packed", "an untagged parameter", "gradient norm"),
    (2, "zero1 tp2 sequence-parallel", "an untagged parameter", "gradient norm"),
    (2, "zero1 dp", "a sum where the library averages", "gradient norm"),
    (2, "fsdp2 dp", "a sum where the library averages", "gradient norm"),
    (4, "zero3 dp sp2", "an average over sp", "gradient norm"),
    (2, "dp packed", "norms that differ in a bit", "(loss, gradient norm) of rank 0"),
    (2, "sp2 packed", "a gradient that is not shown", "gradient/norm.weight"),
    (2, "dp packed", "no update", "model/embedding_weight"),
    (2, "sp2 packed full", "recomputation in other bits", "bits of "),
    (2, "dp carried", "states of other rows", "loss"),
    (2, "dp", "a refusal", "error"),
]


@pytest.mark.parametrize("world, name, fault, quantity", NEGATIVE)
def test_parity_fails_where_it_must(world: int, name: str, fault: str, quantity: str) -> None:
    broken, repaired = run_on(world, run_with_fault, name, fault)[0]
    assert not broken.passed
    assert any(quantity in failure.quantity for failure in broken.failures), describe(broken)
    assert all(failure.case == name and failure.host for failure in broken.failures)
    assert repaired.passed, describe(repaired)


def test_every_fault_is_tried() -> None:
    assert {fault for _, _, fault, _ in NEGATIVE} == set(FAULTS)


def test_messages_keep_their_order_and_neighbours_are_timed() -> None:
    result, neighbours = run_on(4, run_order)[0]
    assert result.passed, describe(result)
    assert [(pair.left, pair.right) for pair in neighbours] == [(0, 1), (1, 2), (2, 3)]
    assert all(pair.latency_us > 0 and pair.gigabytes_per_s > 0 for pair in neighbours)


def test_messages_in_the_wrong_order_are_found() -> None:
    result = run_on(4, run_order_with_fault)[0]
    (failure,) = result.failures
    assert failure.rank == 2
    assert "rightward from rank 1" in failure.quantity
    assert "rightward from rank 1" in failure.found
    assert failure.quantity != failure.found


def test_a_failure_says_where() -> None:
    failure = Failure(case="sp2", quantity="loss", expected="1", found="2", step=3, rank=5, host="node7")
    assert failure.line() == "step 3, rank 5 on node7: loss: expected 1, found 2"


def test_bits_are_compared_with_a_row_of_the_same_ranks() -> None:
    rows = {case.name: case for case in CASES if isinstance(case, Case)}
    same = [(case, rows[case.same_bits_as]) for case in rows.values() if case.same_bits_as is not None]
    assert same
    for case, other in same:
        assert other.same_bits_as is None
        for field in ("smallest_world", "packed", "model", "optimizer", "accumulation", "mode"):
            assert getattr(case, field) == getattr(other, field), (case.name, field)
