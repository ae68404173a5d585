"""A document's outputs and gradients do not depend on what it is packed with, nor on its own future."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.conftest import CASES, VOCABULARY, tiny_config
from trellis_dist.models.config import AttentionConfig
from trellis_dist.models.context import packed_context
from trellis_dist.models.language_model import build_language_model

MODELS = {
    "trellis": {},
    "attention": {"pattern": ("attention",), "attention": AttentionConfig(window=3)},
    "hybrid": {"pattern": ("trellis", "attention"), "trellis": {"learned_initial_memory": True}},
    "corrected": {"trellis": {"update": "corrected", "readout": "silu_rms", "value_gates": "own"}},
    **CASES,
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request, tiny):
    return tiny(**request.param)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_packed_equals_each_document_alone(model, tokens):
    rows, length, boundaries = 2, 17, [0, 1, 3, 9, 17, 22, 34]
    x, labels = tokens(rows, length), tokens(rows, length, seed=1)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    packed = model(x, cu_seqlens=cu_seqlens).view(rows * length, -1)
    packed_gradients = gradients(model, model.loss_sum(x, labels, cu_seqlens=cu_seqlens))

    spans = [slice(a, b) for a, b in itertools.pairwise(boundaries)]
    alone = [(x.flatten()[span][None], labels.flatten()[span][None]) for span in spans]
    expected = torch.cat([model(document)[0] for document, _ in alone])
    torch.testing.assert_close(packed, expected, atol=1e-11, rtol=1e-11)
    expected_gradients = gradients(model, sum(model.loss_sum(*pair) for pair in alone))
    torch.testing.assert_close(packed_gradients, expected_gradients, atol=1e-9, rtol=1e-9)


@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, 23)), rows=st.sampled_from([1, 2, 3]))
def test_neighbours_do_not_matter(cuts, rows):
    model = build_language_model(tiny_config(pattern=("trellis", "attention")), seed=0, dtype=torch.float64)
    x = torch.randint(VOCABULARY, (rows, 24 // rows), generator=torch.Generator().manual_seed(0))
    row_starts = set(range(0, 24, 24 // rows))
    cu_seqlens = torch.tensor(sorted({0, 24} | cuts))
    starts = [*sorted(row_starts | cuts), 24]
    middle = len(starts) // 2
    begin, end = starts[middle - 1], starts[middle]
    changed = (x.flatten() + 1) % VOCABULARY
    changed[begin:end] = x.flatten()[begin:end]
    with torch.no_grad():
        first = model(x, cu_seqlens=cu_seqlens).flatten(0, 1)[begin:end]
        second = model(changed.view_as(x), cu_seqlens=cu_seqlens).flatten(0, 1)[begin:end]
    assert torch.equal(first, second)


def test_rows_are_documents_even_if_not_listed(model, tokens):
    x = tokens(3, 10)
    torch.testing.assert_close(model(x, cu_seqlens=torch.tensor([0, 30])), model(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("position", [0, 3, 4, 11])
def test_a_change_alters_nothing_before_it(model, tokens, position):
    x = tokens(1, 14)
    changed = x.clone()
    changed[0, position] = (changed[0, position] + 1) % VOCABULARY
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


def test_context_positions_and_edges():
    context = packed_context(torch.tensor([0, 2, 6, 8]), rows=2, length=4, chunk_sizes=[4], conv_kernel=4)
    assert context.lengths == (2, 2, 2, 2)
    assert context.positions.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [edge.tolist() for edge in context.edges] == [[2, 4, 6], [2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]
    assert context.packed


def test_empty_documents_are_dropped(tokens, tiny):
    x, model = tokens(1, 6), tiny()
    expected = model(x, cu_seqlens=torch.tensor([0, 4, 6]))
    assert torch.equal(model(x, cu_seqlens=torch.tensor([0, 0, 4, 4, 6, 6])), expected)


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        (torch.tensor([0, 5]), "rise from 0 to 6"),
        (torch.tensor([1, 6]), "rise from 0 to 6"),
        (torch.tensor([0, 4, 2, 6]), "rise from 0 to 6"),
        (torch.tensor([0.0, 6.0]), "int32 or int64"),
        (torch.tensor([0]), "int32 or int64"),
    ],
)
def test_bad_boundaries_are_refused(tiny, tokens, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        tiny()(tokens(2, 3), cu_seqlens=cu_seqlens)
