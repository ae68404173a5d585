"""Summed cross-entropy of a linear output layer, without keeping the logits.

The logits of one block of rows are made, turned into their own gradient in place, and multiplied out before
the next block, so memory is bounded by the block and nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trellis_dist.models.linear import matmul_transposed

__all__ = ["IGNORED_LABEL", "linear_cross_entropy_sum"]

IGNORED_LABEL = -100

# Elements of one block of logits: 8 MB of fp32 stays in a CPU's cache, a GPU wants larger matmuls.
_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0
) -> Tensor:
    """Sum over the rows with a label of  -log softmax(weight h)[label] + z_loss * logsumexp(weight h)^2.

    Args:
        hidden: [N, dim].
        weight: [vocab, dim].
        labels: int64 [N]; rows labelled -100 count nothing.
        z_loss: weight of the squared log-partition (PaLM, section 5).

    Returns:
        fp32 scalar (fp64 for fp64 inputs).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, z_loss)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = max(1, _BLOCK_ELEMENTS.get(hidden.device.type, 1 << 24) // len(weight))
        differentiate = any(ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if differentiate else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if differentiate else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            span = slice(start, start + rows)
            loss, dlogits = _block(hidden[span], weight, labels[span], z_loss, differentiate)
            total += loss
            if dhidden is not None and dweight is not None:
                dhidden[span] = matmul_transposed(dlogits, weight.t())
                dweight += matmul_transposed(dlogits.t(), hidden[span].t())
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal.to(dhidden.dtype), (dweight * dtotal).to(ctx.weight_dtype), None, None


def _block(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Loss of one block of rows and the gradient of its logits (unused memory when not differentiating)."""
    logits = matmul_transposed(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    valid = labels != IGNORED_LABEL
    index = labels.where(valid, 0).unsqueeze(-1)
    log_p = torch.log_softmax(logits, dim=-1)
    nll = -log_p.gather(-1, index)
    log_partition = logits.gather(-1, index) + nll
    valid_column = valid.unsqueeze(-1).to(nll.dtype)
    loss = ((nll + z_loss * log_partition.square()) * valid_column).sum()
    if differentiate:
        # d loss / d logits = p (1 + 2 z lse) - onehot(label), zero for ignored rows
        log_p.exp_().mul_((1 + 2 * z_loss * log_partition) * valid_column)
        log_p.scatter_add_(-1, index, -valid_column)
    return loss, log_p.to(hidden.dtype)
