"""y = x W^T, on the faster of the two matrix libraries that a CPU build of PyTorch carries.

F.linear sends fp32 to MKL, which keeps to a slow path on processors that are not Intel: 40-90 GFLOP/s on one
core of an AMD EPYC where oneDNN reaches 200-230 forward and backward at the sizes of a small model: a
training step of 2M parameters takes 0.75 of the CPU time. PyTorch calls oneDNN for fp32 only from compiled
graphs, through an operator that this module borrows; where the operator is missing, or anything but fp32 on a
CPU is asked for, F.linear is used. Inductor compiles that operator for constant weights only, so in graphs of
torch.compile it goes by a name of ours, ``trellis::linear``, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ColumnFunction", "RowFunction", "SplitLayer", "linear", "linear_joined", "matmul_transposed"]

# What a layer calls to enter and to leave its split dimension; parallel/ replaces both. ``column`` takes the
# weights that it multiplies side by side, ``row`` sums over the split input features.
ColumnFunction = Callable[[Tensor, Sequence[Tensor]], Tensor]
RowFunction = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class SplitLayer(Protocol):
    """A layer whose inner features can be split: mixers and MLPs."""

    column: ColumnFunction
    row: RowFunction


# Below this many rows (decoding) set-up and copies cost more than they save.
_MIN_ROWS = 32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    if _fast(x, weight):
        return _Linear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]
    return F.linear(x, weight)


def linear_joined(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The products of x [..., in] with each weight [out_i, in] transposed, side by side: [..., sum of out_i].

    With many rows it is one matmul of the joined weights; with few, copying the weights together would cost
    more than reading them, so each is multiplied where it lies.
    """
    if x.numel() < _MIN_ROWS * x.shape[-1]:
        return torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    return linear(x, torch.cat(list(weights)))


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [n, k] transposed: [m, n], of any strides. No gradients."""
    if not _fast(a, b):
        return a @ b.t()
    assert _ONEDNN is not None, "_fast promises the operator"
    # The operator is fastest when the longer side of the result is its second operand's.
    return _ONEDNN(a, b) if len(a) <= len(b) or a.is_contiguous() else _ONEDNN(b, a).t()


def _fast(x: Tensor, weight: Tensor) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return fp32 and x.device.type == "cpu" and _ONEDNN is not None and x.numel() >= _MIN_ROWS * x.shape[-1]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_transposed(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = matmul_transposed(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        inputs = x.reshape(-1, x.shape[-1])
        dweight = matmul_transposed(rows.t(), inputs.t()) if ctx.needs_input_grad[1] else None
        return dx, dweight


def _borrowed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # type: ignore[no-any-return]


# Outside graphs the name would only cost time: tens of microseconds a call.
_named = torch.library.custom_op("trellis::linear", _borrowed, mutates_args=())


@_named.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _find_operator() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's linear, or None where this PyTorch has none or it does not do what it did."""
    if not torch.backends.mkldnn.is_available():
        return None

    def onednn(x: Tensor, weight: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.trellis.linear(x, weight)  # type: ignore[no-any-return]
        return _borrowed(x, weight)

    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).t()
    try:
        return onednn if torch.equal(onednn(x, weight), x @ weight.t()) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


_ONEDNN = _find_operator()
