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
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_product_", "faster", "product"]

# Multiplications in one matrix from which PyTorch asks oneDNN, whatever the batch.
_SMALLEST = 16**3
_LARGEST_ERROR = 1e-5  # of a trial; fp32 leaves 1e-6, bf16 or tf32 operands 1e-3

_switch: Any = getattr(torch.backends.mkldnn, "matmul", None)


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b [P, H, i, j], into ``out`` where it is given."""
    flat = None if out is None else out.flatten(0, 1)
    a3, b3 = a.flatten(0, 1), b.flatten(0, 1)
    with faster((a3, b3)):
        return torch.bmm(a3, b3, out=flat).view(*a.shape[:-1], b.shape[-1])


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, in place."""
    a3, b3 = a.flatten(0, 1), b.flatten(0, 1)
    with faster((a3, b3)):
        total.flatten(0, 1).baddbmm_(a3, b3)
    return total


def faster(*pairs: tuple[Tensor, Tensor]) -> AbstractContextManager[None]:
    """Within it PyTorch asks oneDNN for products [., i, k] @ [., k, j] of the sizes and strides of all pairs.

    Where any of them would not be exact, or is small, all stay with MKL. Asking once for a loop of small
    steps saves a fifth of their time.
    """
    return _PERMISSION if all(_on_onednn(a, b) for a, b in pairs) else _NOTHING


class _Permission(AbstractContextManager[None]):
    """The switch belongs to the process: the first of several holders turns it, the last turns it back."""

    def __init__(self) -> None:
        self._lock, self._holders, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._before = _switch.fp32_precision
                _switch.fp32_precision = "bf16"
            self._holders += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                _switch.fp32_precision = self._before


_PERMISSION, _NOTHING = _Permission(), nullcontext()


def _on_onednn(a: Tensor, b: Tensor) -> bool:
    (_, i, k), j = a.shape, b.shape[2]
    if a.dtype != torch.float32 or not a.is_cpu or i * j * k <= _SMALLEST:
        return False
    return _onednn_is_exact(i, j, k, a.stride(2) == 1, b.stride(2) == 1)


@functools.lru_cache(maxsize=1024)
def _onednn_is_exact(i: int, j: int, k: int, rows_a: bool, rows_b: bool) -> bool:
    """Whether oneDNN keeps fp32 at these sizes; ``rows_``: rows are contiguous, else columns are."""
    if _switch is None or not torch.backends.mkldnn.is_available() or not hasattr(_switch, "fp32_precision"):
        return False
    # Fixed values without a short binary form, so that rounding shows and no random state moves.
    a = torch.arange(2 * i * k, dtype=torch.float32, device="cpu").add_(1).sqrt_().remainder_(1).view(2, i, k)
    b = torch.arange(2 * k * j, dtype=torch.float32, device="cpu").add_(2).sqrt_().remainder_(1).view(2, k, j)
    exact = a.double() @ b.double()
    a = a if rows_a else a.mT.contiguous().mT
    b = b if rows_b else b.mT.contiguous().mT
    with _PERMISSION:
        found = torch.bmm(a, b)
    difference = (found - exact).abs().amax() / exact.abs().amax()
    return bool(difference <= _LARGEST_ERROR)
