"""Decays per channel inside a chunk: against every pair written out, and where exponents are extreme."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.baselines.vector_decay import chunk_decays, mix, scores
from tests.kernels.baselines.driver import leaves, normal

CHUNKS, CHANNELS = 3, 4


def pairs(g: Tensor) -> Tensor:
    """e^{g_j+1 + ... + g_i} [N, C, C, F] for i >= j, else 0, each exponent summed for itself."""
    rows = []
    for i in range(g.shape[1]):
        row = [
            g[:, j + 1 : i + 1].sum(1).exp() if j <= i else torch.zeros_like(g[:, 0])
            for j in range(g.shape[1])
        ]
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def drawn(size: int, rows: int, columns: int, strength: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = normal(generator, CHUNKS, size, rows, CHANNELS)
    y = normal(generator, CHUNKS, size, columns, CHANNELS)
    g = -strength * torch.rand(CHUNKS, size, CHANNELS, generator=generator, dtype=torch.float64)
    return leaves([x, y, g, normal(generator, CHUNKS, size * rows, size * columns)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("strength", [3.0, 60.0])
def test_products_and_gradients_are_those_of_all_pairs(size, rows, columns, strength):
    inputs = x, y, g, p = drawn(size, rows, columns, strength)
    decays = pairs(g)
    blocks = p.unflatten(2, (size, columns)).unflatten(1, (size, rows))
    expected = (
        torch.einsum("nixf,njyf,nijf->nixjy", x, y, decays).flatten(3).flatten(1, 2),
        torch.einsum("nixjy,njyf,nijf->nixf", blocks, y, decays),
    )
    found = scores(x, y, g), mix(p, y, g)
    results = []
    for outputs in (found, expected):
        generator = torch.Generator().manual_seed(1)
        loss = sum((out * normal(generator, *out.shape)).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-11)


def test_a_decay_is_precise_beside_a_far_stronger_one():
    """Behind e^-1e6, fp32: the difference of two cumulative sums would have lost all of the -0.01."""
    g = torch.full((1, 8, 1), -0.01)
    g[0, 2] = -1e6
    ones = torch.ones(1, 8, 1, 1)
    a = scores(ones, ones, g)[0]
    since, until = chunk_decays(g)
    torch.testing.assert_close(a[7, 3], torch.tensor(-0.04).exp())
    torch.testing.assert_close(until[0, 3, 0], torch.tensor(-0.04).exp())
    torch.testing.assert_close(since[0, 1, 0], torch.tensor(-0.02).exp())
    assert a[7, 1] == 0
    assert since[0, 2, 0] == 0
    assert until[0, 1, 0] == 0
