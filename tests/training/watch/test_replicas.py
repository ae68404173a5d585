from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed import gloo_pool
from tests.training.watch.replica_cases import check_case, train_and_check_case
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.watch import replicas
from trellis_dist.training.watch.replicas import (
    check_replicas,
    compare,
    copies,
    parameter_digests,
    why_no_copies,
)

BITS = {torch.bfloat16: 16, torch.float32: 32, torch.float64: 64, torch.int8: 8, torch.complex128: 64}


def digest(tensor: torch.Tensor) -> list[int]:
    return parameter_digests([("x", tensor)])[0].tolist()


@given(data=st.data(), dtype=st.sampled_from(list(BITS)), size=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_changes_the_digest(data: st.DataObject, dtype: torch.dtype, size: int) -> None:
    words = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[BITS[dtype]]
    count = size * (2 if dtype == torch.complex128 else 1)
    bit = data.draw(st.integers(0, BITS[dtype] - 1))
    where = data.draw(st.integers(0, count - 1))
    pattern = torch.randint(-128, 127, (count,), generator=torch.Generator().manual_seed(size)).to(words)
    flipped = pattern.clone()
    flipped[where] ^= (1 << bit) - (1 << BITS[dtype] if bit == BITS[dtype] - 1 else 0)
    assert digest(pattern.view(dtype))[0] != digest(flipped.view(dtype))[0]


def test_digests_are_of_bits_not_values_and_see_elements_that_changed_places() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))


def test_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    whole = digest(values)
    assert digest(values.T.contiguous().T) == whole
    monkeypatch.setattr(replicas, "PIECE", 10)
    assert digest(values) == whole
    assert digest(torch.zeros(0)) == [0, 0]
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))
    assert parameter_digests([]).shape == (0, 2)


def test_the_minority_is_named_and_two_that_differ_are_both() -> None:
    gathered = torch.zeros(4, 3, 2, dtype=torch.int64)
    gathered[2, 0, 0] = 5  # among four
    gathered[1, 1, 1] = 5  # among two
    parameters = [("a", [(0, 1, 2, 3)]), ("b", [(0, 1), (2, 3)]), ("c", [(0, 1, 2, 3)])]
    first, second = compare(gathered, parameters)
    assert (first.parameter, first.ranks, first.told) == ("a", (2,), True)
    assert (second.parameter, second.ranks, second.told) == ("b", (0, 1), False)
    assert str(first) == "a on rank 2 differs from its other 3 copies"
    assert str(second) == "b differs between ranks 0, 1 (which is right cannot be told)"
    split = torch.tensor([0, 0, 1, 1]).view(4, 1, 1).expand(4, 1, 2)
    assert compare(split, [("d", [(0, 1, 2, 3)])])[0].ranks == (0, 1, 2, 3)


def test_copies_run_over_the_axes_that_divide_nothing() -> None:
    mesh = Mesh(dp=2, sp=2, tp=2)
    assert copies(mesh, divided=(), whole_over_tp=True) == [tuple(range(8))]
    assert copies(mesh, divided=(), whole_over_tp=False) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert copies(mesh, divided=("dp",), whole_over_tp=False) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert copies(mesh, divided=("dp", "sp"), whole_over_tp=True) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert copies(mesh, divided=("dp", "sp"), whole_over_tp=False) == []


def test_one_rank_has_nothing_to_compare() -> None:
    model = torch.nn.Linear(3, 3)
    check_replicas(model, Mesh(), step=1)
    assert why_no_copies(model, Mesh()) == "one rank holds everything: no copy to compare with"


@pytest.mark.parametrize("engine", ["local", "zero1"])
def test_among_four_replicas_the_rank_with_the_flipped_bit_is_named(engine: str) -> None:
    for rank, name, element in ((0, "bias", 12), (3, "embedding", 50)):
        answers = gloo_pool(4).run(check_case, engine, {"dp": 4}, (rank, name, element))
        assert len(set(answers)) == 1
        assert answers[0] == (
            None,
            f"weights that must be equal differ after step 7: {name} on rank {rank} differs from its other 3 "
            f"copies; suspect the memory or device of rank {rank} and start again from the last checkpoint",
        )


@pytest.mark.parametrize(
    "engine, axes, flip, expected",
    [
        ("local", {"dp": 2, "tp": 2}, (3, "hidden", 5), "hidden differs between ranks 1, 3 "),
        ("local", {"dp": 2, "tp": 2}, (3, "gain", 5), "gain on rank 3 differs from its other 3 "),
        ("fsdp2", {"dp": 2, "sp": 2}, (2, "output", 7), "output differs between ranks 2, 3 "),
        ("zero3-kept", {"dp": 4}, (1, "gain", 2), "gain on rank 1 differs from its other 3 "),
        ("zero3", {"dp": 2, "tp": 2}, (0, "embedding", 2), "embedding differs between ranks 0, 1 "),
    ],
)
def test_copies_are_found_on_every_mesh_and_engine(
    engine: str, axes: dict[str, int], flip: tuple[int, str, int], expected: str
) -> None:
    clean = gloo_pool(4).run(check_case, engine, axes, None)
    assert clean == [(None, "")] * 4
    answers = gloo_pool(4).run(check_case, engine, axes, flip)
    assert len(set(answers)) == 1
    assert expected in answers[0][1]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_weights_divided_over_every_rank_have_no_copies(engine: str) -> None:
    why = "weights are divided over every rank: no copy to compare with"
    assert gloo_pool(2).run(check_case, engine, {"dp": 2}, (1, "embedding", 3)) == [(why, "")] * 2


@pytest.mark.parametrize("engine", ["local", "zero0", "zero2", "zero3-kept"])
def test_training_keeps_copies_equal(engine: str) -> None:
    assert gloo_pool(2).run(train_and_check_case, engine, 3) == ["", ""]


def test_two_replicas_are_both_named() -> None:
    answers = gloo_pool(2).run(check_case, "local", {"dp": 2}, (1, "embedding", 0))
    assert answers[0] == answers[1]
    assert "embedding differs between ranks 0, 1 (which is right cannot be told)" in answers[0][1]
