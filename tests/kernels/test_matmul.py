"""Products on the faster library are fp32 products, and a matrix does not depend on its batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import matmul
from kernels.matmul import add_product_, product

SIZES = [
    (64, 32, 32),
    (64, 32, 64),
    (64, 64, 32),
    (32, 64, 32),
    (16, 16, 16),
    (17, 16, 16),
    (48, 96, 24),
    (5, 7, 3),
]


@pytest.fixture(autouse=True)
def _fresh_trials() -> Iterator[None]:
    matmul._onednn_is_exact.cache_clear()
    yield
    matmul._onednn_is_exact.cache_clear()


def operands(i: int, k: int, j: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(i + k + j)
    a = torch.randn(12, 2, *((k, i) if layout == "tn" else (i, k)), generator=g)
    b = torch.randn(12, 2, *((j, k) if layout == "nt" else (k, j)), generator=g)
    return a.mT if layout == "tn" else a, b.mT if layout == "nt" else b


@pytest.mark.parametrize("layout", ("nn", "nt", "tn"))
@pytest.mark.parametrize("size", SIZES)
def test_products_are_fp32_and_independent_of_the_batch(size: tuple[int, int, int], layout: str) -> None:
    a, b = operands(*size, layout)
    total = torch.ones(12, 2, size[0], size[2])
    exact = a.double() @ b.double()
    scale = exact.abs().amax()
    assert (product(a, b) - exact).abs().amax() <= 1e-6 * scale
    assert torch.equal(product(a, b, out=torch.empty_like(product(a, b))), product(a, b))
    assert (add_product_(total.clone(), a, b) - (1 + exact)).abs().amax() <= 1e-6 * scale
    for count in (1, 5):
        parts = zip(a.split(count), b.split(count), total.split(count), strict=True)
        cut = torch.cat([add_product_(t.clone(), x, y) for x, y, t in parts])
        assert torch.equal(cut, add_product_(total.clone(), a, b))


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.bmm

    def rounding(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        permitted = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        return (a.bfloat16() @ b.bfloat16()).float() if permitted else exact(a, b, out=out)

    monkeypatch.setattr(torch, "bmm", rounding)
    a, b = operands(64, 32, 32, "nn")
    assert torch.equal(product(a, b), torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(12, 2, 64, 32))


def test_the_permission_ends_with_the_product_and_the_trial_draws_nothing() -> None:
    before, state = torch.backends.mkldnn.matmul.fp32_precision, torch.get_rng_state()
    a, b = operands(64, 32, 32, "nn")
    product(a, b)
    with pytest.raises(RuntimeError):
        add_product_(torch.zeros(12, 2, 3, 3), a, b)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_switch_products_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_switch", None)
    a, b = operands(64, 32, 32, "nn")
    assert torch.equal(product(a, b), torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(12, 2, 64, 32))


def test_threads_and_nesting_leave_the_permission_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    a, b = operands(64, 32, 32, "nn")
    a3, b3 = a.flatten(0, 1), b.flatten(0, 1)

    def work(_: int) -> None:
        for _ in range(200):
            with matmul.faster((a3, b3)):
                product(a, b)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_trial_is_in_fp32_whatever_the_default_type() -> None:
    seen: list[torch.dtype] = []
    exact = torch.bmm

    def noted(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(a.dtype)
        return exact(a, b, **options)

    a, b = operands(64, 32, 32, "nn")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bmm", noted)
            product(a, b)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {torch.float32}
