"""Rows that take over states from earlier rows compute what one long row computes, and leave its state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.conftest import VOCABULARY, tiny_config
from trellis_dist.models.carry import CarriedState, Carry
from trellis_dist.models.language_model import LanguageModel, build_language_model

LANES, LENGTH = 2, 66
# Document starts in each lane: a row's last token, a second token, rows of several documents and of none.
STARTS = ((0, 10, 37), (0, 12, 21, 23, 63))
MODELS: dict[str, dict[str, Any]] = {
    "trellis": {},
    "corrected": {"update": "corrected", "readout": "silu_rms", "value_gates": "own"},
    "learned memory": {"learned_initial_memory": True},
    "no convolution": {"conv_kernel": 0},
    "long convolution": {"conv_kernel": 9},
}


def build(change: dict[str, Any]) -> LanguageModel:
    return build_language_model(tiny_config(trellis=change), seed=0, dtype=torch.float64)


def stream(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(VOCABULARY, (2, LANES, LENGTH), generator=generator)
    return tokens, labels


def bounds(starts: tuple[tuple[int, ...], ...], length: int) -> torch.Tensor:
    firsts = [lane * length + start for lane, found in enumerate(starts) for start in sorted({0, *found})]
    return torch.tensor([*firsts, len(starts) * length])


def rows_of(starts: tuple[tuple[int, ...], ...], begin: int, width: int) -> tuple[torch.Tensor, list[int]]:
    """Boundaries inside the rows [begin, begin + width), and what earlier rows read of their documents."""
    inside = tuple(tuple(s - begin for s in lane if begin <= s < begin + width) for lane in starts)
    before = [begin - max(s for s in lane if s <= begin) for lane in starts]
    return bounds(inside, width), before


def by_rows(model: LanguageModel, width: int, starts: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """Losses of the rows of ``width`` tokens, one after the other."""
    tokens, labels = stream()
    losses, states = [], None
    for begin in range(0, LENGTH, width):
        here = slice(begin, begin + width)
        cu_seqlens, before = rows_of(starts, begin, width)
        carry = Carry(before, states)
        losses.append(model.loss_sum(tokens[:, here], labels[:, here], cu_seqlens=cu_seqlens, carry=carry))
        states = carry.states()
    return losses


def whole(model: LanguageModel, starts: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    tokens, labels = stream()
    return model.loss_sum(tokens, labels, cu_seqlens=bounds(starts, LENGTH))


@pytest.mark.parametrize("width", [1, 2, 11, 22, 33])
@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_rows_that_carry_are_one_long_row(change: dict[str, Any], width: int) -> None:
    model = build(change)
    together = torch.stack(by_rows(model, width, STARTS)).sum()
    torch.testing.assert_close(together, whole(model, STARTS), atol=1e-10, rtol=1e-12)
    other_documents = torch.stack(by_rows(model, width, ((0,), (0,)))).sum()
    assert abs((together - other_documents).item()) > 1e-3


@settings(max_examples=15, deadline=None)
@given(lanes=st.tuples(*[st.sets(st.integers(0, LENGTH - 1))] * LANES), width=st.sampled_from([3, 6, 22]))
def test_wherever_documents_start(lanes: tuple[set[int], ...], width: int) -> None:
    model = build({"conv_kernel": 5})
    starts = tuple(tuple(sorted({0, *lane})) for lane in lanes)
    together = torch.stack(by_rows(model, width, starts)).sum()
    torch.testing.assert_close(together, whole(model, starts), atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_gradients_are_those_of_the_row_with_its_states_held_fixed(change: dict[str, Any]) -> None:
    model, (tokens, labels) = build(change), stream()
    cu_seqlens, before = rows_of(STARTS, 0, 22)
    first = Carry(before)
    model.loss_sum(tokens[:, :22], labels[:, :22], cu_seqlens=cu_seqlens, carry=first)
    cu_seqlens, before = rows_of(STARTS, 22, 22)
    assert all(tokens > 0 for tokens in before), "both rows go on with a document"

    def loss() -> torch.Tensor:
        carry = Carry(before, first.states())
        return model.loss_sum(tokens[:, 22:44], labels[:, 22:44], cu_seqlens=cu_seqlens, carry=carry)

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        expected = slope(parameter, direction, loss)
        assert parameter.grad is not None, name
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx(expected, rel=2e-6, abs=1e-7), name


@torch.no_grad()
def slope(parameter: torch.Tensor, direction: torch.Tensor, loss: Any, step: float = 1e-5) -> float:
    """Central difference of ``loss`` along ``direction``."""
    start, ends = parameter.clone(), []
    for sign in (1, -1):
        parameter.copy_(start + sign * step * direction)
        ends.append(float(loss()))
    parameter.copy_(start)
    return (ends[0] - ends[1]) / (2 * step)


def test_states_are_detached_and_of_a_fixed_size() -> None:
    model = build({})
    sizes = set()
    for width in (11, 33):
        carry = Carry(rows_of(STARTS, 0, width)[1])
        tokens, labels = (x[:, :width] for x in stream())
        cu_seqlens = rows_of(STARTS, 0, width)[0]
        model.loss_sum(tokens, labels, cu_seqlens=cu_seqlens, carry=carry).backward()
        tensors = [x for state in carry.states() for x in vars(state).values()]
        assert not any(x.requires_grad for x in tensors)
        sizes.add(tuple(tuple(x.shape) for x in tensors))
    assert len(sizes) == 1


def test_what_a_row_leaves_of_another_document_is_not_seen() -> None:
    """A row that begins a document gives the same bits whatever it is handed, NaN too."""
    model, (tokens, labels) = build({}), stream()
    cu_seqlens, before = bounds(((0,), (0, 3)), 22), [0, 1]
    first = Carry([0, 0])
    model.loss_sum(tokens[:, 22:44], labels[:, 22:44], cu_seqlens=cu_seqlens, carry=first)

    def logits_of(states: tuple[CarriedState, ...]) -> torch.Tensor:
        masked = labels[:, :22].clone()
        masked[1, :3] = -100  # the document that goes on, and may show it
        return model.loss_sum(tokens[:, :22], masked, cu_seqlens=cu_seqlens, carry=Carry(before, states))

    spoilt = []
    for state in first.states():
        parts = {name: x.clone() for name, x in vars(state).items()}
        for name, x in parts.items():
            x[0] = float("nan")
            if name == "tail":
                x[1, :-1] = float("nan")  # one token was read before: the inputs further back are not its own
        spoilt.append(CarriedState(**parts))
    assert torch.equal(logits_of(first.states()), logits_of(tuple(spoilt)))


def test_lost_states_are_new_memories_in_the_middle_of_a_chunk() -> None:
    model, (tokens, labels) = build({"learned_initial_memory": True}), stream()
    cu_seqlens = bounds(((0,), (0,)), 22)
    lost = model.loss_sum(tokens[:, :22], labels[:, :22], cu_seqlens=cu_seqlens, carry=Carry([2, 2]))
    # The same memories held through two tokens that write nothing: a chunk grid shifted by two.
    state = model.init_state(LANES)
    shifted = [
        CarriedState(
            layer.memory.key_memory,
            layer.memory.value_memory,
            layer.memory.key_memory,
            layer.memory.value_memory,
            layer.tail,
        )
        for layer in state.layers
    ]
    given = Carry([2, 2], shifted)
    assert torch.equal(
        lost, model.loss_sum(tokens[:, :22], labels[:, :22], cu_seqlens=cu_seqlens, carry=given)
    )
    fresh = model.loss_sum(tokens[:, :22], labels[:, :22], cu_seqlens=cu_seqlens, carry=Carry([0, 0]))
    assert abs((lost - fresh).item()) > 1e-6


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        ({}, {"cu_seqlens": None}, "needs the boundaries"),
        ({}, {"carry": Carry([0])}, "2 rows of tokens and a carry of 1"),
        ({"pattern": ("trellis", "attention")}, {}, "only trellis layers"),
    ],
)
def test_what_cannot_carry_is_refused(overrides: Any, options: Any, message: str) -> None:
    model = build_language_model(tiny_config(**overrides), seed=0, dtype=torch.float64)
    tokens, labels = stream()
    given = {"cu_seqlens": bounds(STARTS, LENGTH), "carry": Carry([0, 0]), **options}
    with pytest.raises(ValueError, match=message) as refused:
        model.loss_sum(tokens, labels, **given)
    assert "\n" not in str(refused.value)
