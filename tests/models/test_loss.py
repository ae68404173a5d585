"""The fused loss equals the plain one, value and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trellis_dist.models import loss as loss_module
from trellis_dist.models.loss import linear_cross_entropy_sum


def plain(hidden, weight, labels, z_loss):
    logits = F.linear(hidden, weight)
    valid = labels != -100
    log_partition = logits.logsumexp(-1)
    nll = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return nll + z_loss * log_partition[valid].square().sum()


def data(dtype=torch.float64, rows=23, vocabulary=37):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("block", [1, 37 * 7, 1 << 20])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_equals_cross_entropy_with_ignored_labels(monkeypatch, block, z_loss):
    monkeypatch.setitem(loss_module._BLOCK_ELEMENTS, "cpu", block)
    hidden, weight, labels = data()
    ours = linear_cross_entropy_sum(hidden, weight, labels, z_loss=z_loss)
    expected = plain(hidden, weight, labels, z_loss)
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)
    got = torch.autograd.grad(3 * ours, [hidden, weight])
    torch.testing.assert_close(
        got, torch.autograd.grad(3 * expected, [hidden, weight]), atol=1e-11, rtol=1e-11
    )


def test_all_labels_ignored_gives_zero():
    hidden, weight, labels = data()
    total = linear_cross_entropy_sum(hidden, weight, torch.full_like(labels, -100), z_loss=0.1)
    assert total.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, [hidden, weight]))


def test_large_logits_stay_finite():
    hidden, weight, labels = data(dtype=torch.float32)
    total = linear_cross_entropy_sum(1e4 * hidden, weight, labels, z_loss=1e-4)
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, [hidden, weight]))


def test_half_precision_sums_in_fp32():
    hidden, weight, labels = data(dtype=torch.bfloat16, rows=400)
    total = linear_cross_entropy_sum(hidden, weight, labels)
    assert total.dtype == torch.float32
    expected = plain(hidden.double(), weight.double(), labels, 0.0)
    assert total.item() == pytest.approx(expected.item(), rel=5e-3)
    got = torch.autograd.grad(total, [hidden, weight])
    expected_gradients = torch.autograd.grad(expected, [hidden, weight])
    for ours, theirs in zip(got, expected_gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("count", [1000, 3000, 7000])
def test_the_scale_of_a_loss_is_not_rounded_to_bf16(count):
    """bf16(1 / count) is off by 7e-4 and more; the rounding of the scaled elements has no common factor."""
    hidden, weight, labels = data(dtype=torch.bfloat16, rows=4000)
    (whole,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels), [hidden])
    (scaled,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels) / count, [hidden])
    assert scaled.dtype == torch.bfloat16
    factor = (whole.double() * scaled.double()).sum() / whole.double().square().sum()
    assert factor.item() * count == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_value_is_computed(monkeypatch, mode):
    hidden, weight, labels = data()
    shapes, multiply = [], loss_module.matmul_transposed

    def counting(a, b):
        shapes.append((*a.shape, len(b)))
        return multiply(a, b)

    monkeypatch.setattr(loss_module, "matmul_transposed", counting)
    with mode():
        total = linear_cross_entropy_sum(hidden, weight, labels)
    assert not total.requires_grad
    assert shapes == [(23, 8, 37)], "the logits and nothing else"
    torch.testing.assert_close(total, plain(hidden, weight, labels, 0.0).detach(), atol=1e-11, rtol=1e-11)
    linear_cross_entropy_sum(hidden, weight, labels)
    assert len(shapes) == 4


def test_a_frozen_side_costs_no_gradient():
    hidden, weight, labels = data()
    frozen = weight.detach()
    (ours,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, frozen, labels), [hidden])
    (expected,) = torch.autograd.grad(plain(hidden, frozen, labels, 0.0), [hidden])
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)


def test_model_loss_is_the_loss_of_its_logits(tiny, tokens):
    model, x, labels = tiny(), tokens(3, 10), tokens(3, 10, seed=1)
    labels[:, ::4] = -100
    logits = model(x).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
    log_partition = logits.logsumexp(-1)[labels.flatten() != -100]
    torch.testing.assert_close(model.loss_sum(x, labels), expected, atol=1e-10, rtol=1e-10)
    with_z = model.loss_sum(x, labels, z_loss=0.01)
    torch.testing.assert_close(with_z, expected + 0.01 * log_partition.square().sum(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(2, 4, dtype=torch.int64), "labels are"),
        (torch.zeros(2, 5, dtype=torch.int32), "labels are"),
        (torch.full((2, 5), 31), "vocab_size = 31"),
        (torch.full((2, 5), -1), "vocab_size = 31"),
    ],
)
def test_bad_labels_are_refused(tiny, tokens, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny().loss_sum(tokens(2, 5), labels)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(5, dtype=torch.int64), "rows, tokens"),
        (torch.zeros(2, 0, dtype=torch.int64), "non-empty"),
        (torch.zeros(2, 5), "int32 or int64"),
        (torch.full((1, 2), 31), "tokens run from 31 to 31: model.vocab_size = 31"),
    ],
)
def test_bad_tokens_are_refused(tiny, bad, message):
    with pytest.raises(ValueError, match=message):
        tiny()(bad)
