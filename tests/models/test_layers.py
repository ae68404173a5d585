"""The small parts against plain PyTorch: convolution, normalisation, rotary positions, attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trellis_dist.models.config import AttentionConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.conv import causal_conv, document_edges
from trellis_dist.models.mixers.attention import rotate
from trellis_dist.models.norm import l2_normalise, rms_normalise


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def plain_conv(x, weight):
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), groups=len(weight)).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 2, 4, 9])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_equals_conv1d(length, taps):
    x, weight = random(2, length, 6), random(6, taps, seed=1)
    ours, expected = causal_conv(x, weight), plain_conv(x, weight)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(causal_conv, (x, weight))


def test_convolution_stops_at_documents():
    bounds = [0, 1, 2, 6, 9, 14]
    x, weight = random(1, 14, 5), random(5, 4, seed=1)
    edges = document_edges(torch.tensor(bounds[:-1]), total=14, kernel=4)
    expected = torch.cat(
        [plain_conv(part, weight) for part in x.split(torch.tensor(bounds).diff().tolist(), 1)], 1
    )
    torch.testing.assert_close(causal_conv(x, weight, edges=edges), expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: causal_conv(x, w, edges=edges), (x, weight))


def test_convolution_continues_from_its_tail():
    x, weight = random(2, 11, 5), random(5, 4, seed=1)
    tail, rest = x[:, 2:5], x[:, 5:]
    torch.testing.assert_close(causal_conv(rest, weight, tail=tail), plain_conv(x, weight)[:, 5:])
    assert torch.autograd.gradcheck(lambda x, w, t: causal_conv(x, w, tail=t), (rest, weight, tail))


def test_carried_tails_reach_the_first_document_of_their_row_only():
    x, weight, tails = random(1, 18, 5), random(5, 4, seed=1), random(2, 3, 5, seed=2)
    rows = x.view(2, 9, 5)
    # Row 0 has a document from its token 2 on, row 1 from its last one; each follows three inputs.
    edges = document_edges(torch.tensor([0, 3 + 2, 12 + 3 + 8]), total=24, kernel=4)
    expected = []
    for row, tail, start in zip(rows, tails, (2, 8), strict=True):
        expected.append(plain_conv(torch.cat([tail, row[:start]])[None], weight)[:, 3:])
        expected.append(plain_conv(row[None, start:], weight))
    torch.testing.assert_close(causal_conv(x, weight, tail=tails, edges=edges), torch.cat(expected, 1))
    assert causal_conv(rows, weight, tail=tails).shape == rows.shape


def test_nothing_leaks_between_documents_even_if_it_is_not_a_number():
    x, weight = random(1, 8, 3).detach(), random(3, 4, seed=1).detach()
    x[:, :4] = torch.nan
    edges = document_edges(torch.tensor([0, 4]), total=8, kernel=4)
    assert causal_conv(x, weight, edges=edges)[:, 4:].isfinite().all()


@pytest.mark.parametrize("shape", [None, (6,), (3, 6)])
def test_rms_normalise_equals_its_formula(shape):
    x = random(2, 3, 6)
    weight = None if shape is None else random(*shape, seed=1)
    expected = x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * (1 if weight is None else weight)
    torch.testing.assert_close(rms_normalise(x, eps=0.1, weight=weight), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_rms_normalise_gradients(shape):
    weight = random(*shape, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, w: rms_normalise(x, eps=0.1, weight=w), (random(2, 3, 6), weight)
    )
    assert torch.autograd.gradcheck(lambda x: rms_normalise(x, eps=0.1, scale=0.3), (random(2, 3, 6),))


def test_l2_normalise_gives_unit_rows_and_survives_zero():
    rows = l2_normalise(random(4, 8))
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    zero = torch.zeros(2, 8, requires_grad=True)
    l2_normalise(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_half_precision_statistics_are_fp32():
    x = 300 * random(2, 64).detach()
    ours = rms_normalise(x.bfloat16(), eps=1e-6)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, rms_normalise(x.bfloat16().double(), eps=1e-6).bfloat16())


def test_rotation_keeps_norms_and_sees_only_distances():
    x, positions = random(1, 12, 2, 8), torch.arange(12)
    turned = rotate(x, positions, theta=100.0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    later = rotate(x, positions + 1000, theta=100.0)
    products, later_products = (torch.einsum("bthd,bshd->bhts", y, y) for y in (turned, later))
    torch.testing.assert_close(products, later_products, atol=1e-10, rtol=1e-10)
    assert torch.equal(turned[:, 0], x[:, 0])


@pytest.mark.parametrize("tokens", [7, 20, 23])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 11, 100])
def test_attention_equals_an_explicit_softmax(tiny, window, tokens):
    """Also in blocks of a window that is shorter than half the row, and backward."""
    model = tiny(pattern=("attention",), attention=AttentionConfig(window=window))
    mixer, x = model.blocks[0].mixer, random(2, tokens, 16).requires_grad_()
    project = [F.linear(x, w).view(2, tokens, 2, 8) for w in (mixer.q_weight, mixer.k_weight, mixer.v_weight)]
    q, k = (rotate(part, torch.arange(tokens), theta=10_000.0) for part in project[:2])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (distance >= 0) & (distance < (window or tokens))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, project[2]).flatten(-2) @ mixer.out_weight.t()
    found = mixer(x, SequenceContext())
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    learned = (x, mixer.q_weight, mixer.k_weight, mixer.v_weight)
    upstream = random(2, tokens, 16)
    gradients = (torch.autograd.grad(y, learned, upstream, retain_graph=True) for y in (found, expected))
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_a_window_keeps_no_mask_of_the_whole_row(tiny):
    """For the backward pass: a [T, T] mask of fp64 would be 8 MiB, all else is in O(T)."""
    model = tiny(pattern=("attention",), attention=AttentionConfig(window=8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model.blocks[0].mixer(random(1, 1024, 16), SequenceContext())
    assert kept
    assert max(kept) < 1024 * 16 * 8


def test_autocast_leaves_the_memories_of_baselines_alone(tiny, tokens):
    """Products of the recurrence stay fp32 where those of the projections become bf16."""
    mixer = tiny(pattern=("gated_deltanet",), dtype=torch.float32).blocks[0].mixer
    inner, seen = mixer.operation, []

    def operation(tokens, weights, memory, layout):
        y, memory = inner(tokens, weights, memory, layout)
        seen.append((torch.is_autocast_enabled("cpu"), memory[0].dtype))
        return y, memory

    mixer.operation = operation
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(x, SequenceContext())
        mixer.prefill(x, mixer.init_state(2))
    assert seen == [(False, torch.float32)] * 2
