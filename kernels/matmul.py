"""Products per chunk and head, on the faster of the two matrix libraries in a CPU build of PyTorch.

Shapes: a [P, H, i, k], b [P, H, k, j]; matrices may be transposed views, the leading dimensions are
contiguous.

PyTorch sends fp32 batches to MKL, which keeps to a slow path on processors that are not Intel: at the sizes
of a chunk oneDNN takes half the time on an AMD EPYC. The only way to oneDNN is the permission to round
operands to bf16, which it takes up where the processor multiplies bf16 matrices (AMX) and ignores elsewhere.
So the permission is given for one product at a time, and only after a trial at the same sizes has come out in
full fp32; otherwise the product stays with MKL. Small products stay there too: PyTorch decides by the size of
the whole batch, and a chunk's bits must not depend on how many chunks are multiplied with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_product_", "product"]

# Multiplications in one matrix from which PyTorch asks oneDNN, whatever the batch.
_SMALLEST = 16**3
_LARGEST_ERROR = 1e-5  # of a trial; fp32 leaves 1e-6, bf16 or tf32 operands 1e-3

_switch: Any = getattr(torch.backends.mkldnn, "matmul", None)


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b [P, H, i, j], into ``out`` where it is given."""
    shape = (*a.shape[:-1], b.shape[-1])
    flat = None if out is None else out.flatten(0, 1)
    return _run(lambda a, b: torch.bmm(a, b, out=flat), a.flatten(0, 1), b.flatten(0, 1)).view(shape)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, in place."""
    _run(total.flatten(0, 1).baddbmm_, a.flatten(0, 1), b.flatten(0, 1))
    return total


def _run(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    (_, i, k), j = a.shape, b.shape[2]
    if a.dtype != torch.float32 or a.device.type != "cpu" or i * j * k <= _SMALLEST:
        return multiply(a, b)
    if not _onednn_is_exact(i, j, k, a.stride(-1) == 1, b.stride(-1) == 1):
        return multiply(a, b)
    return _on_onednn(multiply, a, b)


def _on_onednn(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    before = _switch.fp32_precision
    _switch.fp32_precision = "bf16"
    try:
        return multiply(a, b)
    finally:
        _switch.fp32_precision = before


@functools.lru_cache(maxsize=1024)
def _onednn_is_exact(i: int, j: int, k: int, rows_a: bool, rows_b: bool) -> bool:
    """Whether oneDNN keeps fp32 at these sizes; ``rows_``: rows are contiguous, else columns are."""
    if _switch is None or not torch.backends.mkldnn.is_available() or not hasattr(_switch, "fp32_precision"):
        return False
    # Fixed values without a short binary form, so that rounding shows and no random state moves.
    a = torch.arange(2.0 * i * k).add_(1).sqrt_().remainder_(1).view(2, i, k)
    b = torch.arange(2.0 * k * j).add_(2).sqrt_().remainder_(1).view(2, k, j)
    exact = a.double() @ b.double()
    a = a if rows_a else a.mT.contiguous().mT
    b = b if rows_b else b.mT.contiguous().mT
    difference = (_on_onednn(torch.bmm, a, b) - exact).abs().amax() / exact.abs().amax()
    return bool(difference <= _LARGEST_ERROR)
