"""The faster matrix product gives what F.linear gives, whatever the strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trellis_dist.models import linear as module
from trellis_dist.models.linear import linear, linear_joined, matmul_transposed
from trellis_dist.models.mlp import SwiGLU


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("with_operator", [True, False])
@pytest.mark.parametrize("rows", [(1,), (5, 7), (2, 100)])
def test_equals_f_linear(monkeypatch, rows, with_operator):
    if not with_operator:
        monkeypatch.setattr(module, "_ONEDNN", None)
    x, weight, dy = random(*rows, 24), random(40, 24, seed=1), random(*rows, 40, seed=2)
    ours, expected = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    got = torch.autograd.grad(ours, [x, weight], dy.detach())
    wanted = torch.autograd.grad(expected, [x, weight], dy.detach())
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 100])
def test_joined_products_lie_side_by_side(rows):
    x, weights = random(rows, 24), [random(size, 24, seed=size) for size in (5, 1, 9)]
    ours = linear_joined(x, weights)
    expected = torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    got, wanted = (torch.autograd.grad(y.square().sum(), [x, *weights]) for y in (ours, expected))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


def test_autocast_multiplies_in_half_precision():
    x, weight = random(64, 24), random(40, 24, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()))


@pytest.mark.parametrize("m, n", [(3, 50), (64, 50), (64, 90)])
def test_any_strides(m, n):
    a, b = random(m, 40).detach(), random(n, 40, seed=1).detach()
    expected = a @ b.t()
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            torch.testing.assert_close(matmul_transposed(left, right), expected, atol=1e-4, rtol=1e-4)


def test_the_same_bits_every_time():
    x, weight = random(64, 33), random(17, 33, seed=1)
    first, again = (torch.autograd.grad(linear(x, weight).square().sum(), [x, weight]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_frozen_weight_gets_no_gradient():
    x, weight = random(64, 8), random(4, 8, seed=1).detach()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(64, 8), atol=1e-4, rtol=1e-4)


def test_swiglu_equals_its_formula_with_gradients(config):
    mlp = SwiGLU(config(mlp_hidden=5)).double()
    weights = [random(*p.shape, seed=i, dtype=torch.float64) for i, p in enumerate(mlp.parameters())]
    gate, up, down = weights

    def ours(x, *weights):
        return torch.func.functional_call(
            mlp, dict(zip(dict(mlp.named_parameters()), weights, strict=True)), (x,)
        )

    x = random(3, 16, seed=9, dtype=torch.float64)
    expected = (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    torch.testing.assert_close(ours(x, *weights), expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(ours, (x, *weights))
