"""Every function the operation computes: fp64 chunkwise equals the token recurrence; mistakes are seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import carry, stages
from kernels.activations import PHI, READOUT, UPDATE, ReadoutPullBack
from tests.kernels.helpers import (
    AFFINE,
    MEMORIES,
    OWN_GATES,
    TOLERANCE,
    assert_close,
    assert_matches_reference,
    case_seed,
    make_memories,
    make_operands,
    run,
)

EVERYTHING = (*OWN_GATES, *AFFINE)
NONE_EACH_AND_BOTH = (0, 1), (1, 0), (0, 0), (1, 1)
WIDTHS = (16, 48, 64, 96, 128)
OPERANDS = ("q", "k", "v", "alpha", "log_decay", "step_size", *EVERYTHING)


def chosen(names: tuple[str, str], keep: tuple[int, int]) -> tuple[str, ...]:
    return tuple(itertools.compress(names, keep))


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("readout", READOUT)
@pytest.mark.parametrize("phi", PHI)
def test_every_rule_with_shared_and_own_gates(phi: str, readout: str, update: str) -> None:
    """Per rule all four ways to share gates, each with another affine; over the five phi all 16 pairs."""
    shift = PHI.index(phi)
    for i, gates in enumerate(NONE_EACH_AND_BOTH):
        extra = (*chosen(OWN_GATES, gates), *chosen(AFFINE, NONE_EACH_AND_BOTH[(i + shift) % 4]))
        seed = case_seed(phi, readout, update, extra)
        operands = make_operands(1, 11, 2, seed=seed, extra=extra)
        assert_matches_reference(
            operands,
            make_memories(operands, seed=seed + 1),
            seed=seed + 2,
            offset=(0, 3, 1)[(i + shift) % 3],
            chunk_size=4,
            phi=phi,
            readout=readout,
            update=update,
        )


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("phi", PHI)
def test_every_rule_at_lengths_around_a_chunk(phi: str, update: str) -> None:
    """Each readout at another (T, C); over phi and update all pairs are met."""
    grid = tuple(itertools.product((1, 63, 64, 65), (16, 64, 128)))
    shift = 5 * PHI.index(phi) + UPDATE.index(update)
    for i, readout in enumerate(READOUT):
        length, chunk_size = grid[(shift + 3 * i) % len(grid)]
        seed = case_seed(phi, readout, update, length)
        operands = make_operands(1, length, 2, seed=seed, extra=EVERYTHING)
        memories = make_memories(operands, seed=seed + 1)
        rule = {"phi": phi, "readout": readout, "update": update}
        assert_matches_reference(operands, memories, seed=seed + 2, chunk_size=chunk_size, **rule)


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("key_width", range(5))
def test_every_pair_of_widths(key_width: int, update: str) -> None:
    """Each pair of (D, V), (D, M) and (V, M) once; as many different functions as sizes."""
    for value_width in range(5):
        sizes = {"d": WIDTHS[key_width], "v": WIDTHS[value_width]}
        sizes["m"] = WIDTHS[(key_width + 2 * value_width) % 5]
        rule = {"phi": PHI[value_width], "readout": READOUT[(key_width + value_width) % 4]}
        seed = case_seed(sizes, update)
        operands = make_operands(1, 7, 1, **sizes, seed=seed, extra=EVERYTHING)
        memories = make_memories(operands, seed=seed + 1)
        assert_matches_reference(
            operands, memories, seed=seed + 2, offset=2, chunk_size=4, update=update, **rule
        )


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("asked", [("y",), *((name,) for name in MEMORIES), ("y", "value_chunk_start")])
def test_gradients_of_some_outputs_alone(asked: tuple[str, ...], update: str) -> None:
    """Upstream gradients that are missing are zeros; documents end inside a chunk and at its end."""
    operands = make_operands(1, 21, 2, seed=case_seed(asked, update), extra=EVERYTHING)
    memories = make_memories(operands, 3)
    options = {"cu_seqlens": torch.tensor([0, 6, 14, 21]), "chunk_size": 4, "update": update}
    results = []
    for backend in ("reference", "chunkwise"):
        found = run(operands, memories, offset=(2, 0, 3), backend=backend, asked=asked, **options)
        results.append({name: x for name, x in found.items() if name.startswith("d") or name in asked})
    assert_close(results[1], results[0], TOLERANCE)


@pytest.fixture(scope="module")
def whole_case() -> dict[str, Any]:
    """One call in which every input matters: operands, memories, options and the expected results."""
    operands = make_operands(2, 9, seed=11, extra=EVERYTHING)
    memories = make_memories(operands)
    options = {"chunk_size": 4, "offset": (3, 1), "update": "corrected"}
    expected = run(operands, memories, backend="reference", **options)
    return {"operands": operands, "memories": memories, "options": options, "expected": expected}


@pytest.mark.parametrize("wrong", ["y", *MEMORIES, *(f"d{name}" for name in (*OPERANDS, *MEMORIES))])
def test_the_comparison_sees_a_result_that_is_twice_too_large(wrong: str, whole_case: dict[str, Any]) -> None:
    expected = whole_case["expected"]
    assert expected[wrong].abs().amax() > 1e-3, "the case does not exercise this gradient"
    with pytest.raises(AssertionError, match=rf"\{{'{wrong}': "):
        assert_close(expected | {wrong: 2 * expected[wrong]}, expected, TOLERANCE)


def zero_property(name: str) -> tuple[object, str, object]:
    return stages.Pass, name, property(lambda own: own.x.new_zeros(*own.x.shape[:3], own.x.shape[2]))


def without(field: str) -> Callable[..., stages.ScanGradients]:
    """The reverse scan of the key memory with one of its results dropped."""

    def broken(*args: Any, **options: Any) -> stages.ScanGradients:
        found = scan_backward(*args, **options)
        key = replace(found.key, **{field: torch.zeros_like(getattr(found.key, field))})
        return replace(found, key=key)

    return broken


def without_affine(x: Tensor, readout: str, weight: Tensor, bias: Tensor) -> Any:
    p, pull_back = readout_vjp(x, readout, weight, bias)

    def broken(grad: Tensor) -> ReadoutPullBack:
        found = pull_back(grad)
        return ReadoutPullBack(found.x, torch.zeros_like(grad), found.bias)

    return p, broken


readout_vjp, scan_backward = stages.readout_vjp, stages.scan_backward
last_starts, adjoint_of_last = carry.last_starts, carry.adjoint_of_last
DROPPED_TERMS = {
    "what a chunk reads of its own writes": (*zero_property("overlap"), "dk"),
    "the inverse": (*zero_property("inverse"), "dstep_size"),
    "the key pass's dz": (stages, "scan_backward", without("z"), "dk"),
    "the key pass's dB": (stages, "scan_backward", without("b"), "dk"),
    "the key pass's adjoints": (stages, "scan_backward", without("end"), "dk"),
    "the key pass's writes": (stages, "scan_backward", without("write"), "dstep_size"),
    "the key pass's dalpha": (stages, "scan_backward", without("alpha"), "dalpha"),
    "dw": (stages, "readout_vjp", without_affine, "dreadout_weight"),
    "gradients of a returned pair inside a chunk": (carry, "outside_adjoint", lambda *_: None, "dk"),
    "gradients of a returned pair at a chunk's end": (
        carry,
        "adjoint_of_last",
        lambda layout, final, last, like: adjoint_of_last(layout, final, None, like),
        "dv",
    ),
    "pairs of documents that end inside a chunk": (
        carry,
        "last_starts",
        lambda final, endings: last_starts(final, []),
        "key_chunk_start",
    ),
    "an entering pair in backward": (stages, "stale_of_chunks", lambda start, pair: start.clone(), "dk"),
}


@pytest.mark.parametrize("term", DROPPED_TERMS)
def test_the_comparison_sees_a_dropped_term(
    term: str, whole_case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, broken, wrong = DROPPED_TERMS[term]
    call, expected = whole_case, whole_case["expected"]
    actual = run(call["operands"], call["memories"], backend="chunkwise", **call["options"])
    assert_close(actual, expected, TOLERANCE)
    monkeypatch.setattr(place, name, broken)
    actual = run(call["operands"], call["memories"], backend="chunkwise", **call["options"])
    with pytest.raises(AssertionError, match=f"'{wrong}': "):
        assert_close(actual, expected, TOLERANCE)
