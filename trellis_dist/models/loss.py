"""Summed cross-entropy of a linear output layer, without keeping the logits.

The logits of one block of rows are made, turned into their own gradient in place, and multiplied out before
the next block, so memory is bounded by the block and nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trellis_dist.models.linear import matmul_transposed

__all__ = ["IGNORED_LABEL", "Scores", "TokenLoss", "linear_cross_entropy_sum", "whole_vocabulary"]

IGNORED_LABEL = -100

# Elements of one block of logits: 8 MB of fp32 stays in a CPU's cache, a GPU wants larger matmuls.
_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}


class Scores(NamedTuple):
    """What a block of logits [n, v] says of its labels; the v columns may be a part of the vocabulary.

    Attributes:
        log_p: [n, v], log softmax over the whole vocabulary.
        nll, log_partition: [n, 1], -log p of the label and log sum exp of all logits.
        column: int64 [n, 1], where the label is (any column where it is not among these).
        owned: bool [n, 1], whether the row has a label and its column is among these.
        valid: bool [n, 1], whether the row has a label.
    """

    log_p: Tensor
    nll: Tensor
    log_partition: Tensor
    column: Tensor
    owned: Tensor
    valid: Tensor


ScoreFunction = Callable[[Tensor, Tensor], Scores]


def whole_vocabulary(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits [n, V] with all columns here; labels int64 [n]."""
    valid = (labels != IGNORED_LABEL).unsqueeze(-1)
    index = labels.unsqueeze(-1).where(valid, 0)
    log_p = torch.log_softmax(logits, dim=-1)
    nll = -log_p.gather(-1, index)
    return Scores(log_p, nll, logits.gather(-1, index) + nll, index, valid, valid)


class TokenLoss(Protocol):
    """What a language model calls; parallel/ replaces it to split the vocabulary."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        z_loss: float = 0.0,
        each: Tensor | None = None,
    ) -> Tensor:
        """See ``linear_cross_entropy_sum``."""
        ...


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    score: ScoreFunction = whole_vocabulary,
    each: Tensor | None = None,
) -> Tensor:
    """Sum over the rows with a label of  -log softmax(weight h)[label] + z_loss * logsumexp(weight h)^2.

    Args:
        hidden: [N, dim].
        weight: [vocab, dim].
        labels: int64 [N]; rows labelled -100 count nothing.
        z_loss: weight of the squared log-partition (PaLM, section 5).
        score: for a weight that holds a part of the vocabulary; the gradient of ``hidden`` is then that
            part's, and the ranks that hold the others are to be summed over.
        each: [N], takes -log softmax(weight h)[label] of every row that has a label.

    Returns:
        fp32 scalar (fp64 for fp64 inputs).
    """
    # Asked here: inside the function ``ctx.needs_input_grad`` is true under no_grad too.
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, labels, z_loss, score, differentiate, each
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        score: ScoreFunction,
        differentiate: bool,
        each: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = max(1, _BLOCK_ELEMENTS.get(hidden.device.type, 1 << 24) // len(weight))
        dhidden = torch.empty_like(hidden) if differentiate else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if differentiate else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            span = slice(start, start + rows)
            logits = matmul_transposed(hidden[span], weight).to(wide)
            scores = score(logits, labels[span])
            if each is not None:
                each[span] = torch.where(scores.valid, scores.nll, 0.0).squeeze(-1)
            loss, dlogits = _block(scores, z_loss, differentiate, hidden.dtype)
            total += loss
            if dhidden is not None and dweight is not None:
                dhidden[span] = matmul_transposed(dlogits, weight.t())
                dweight += matmul_transposed(dlogits.t(), hidden[span].t())
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # dtotal (1 / N, say) is a factor of all gradients and must not be rounded to bf16: a tensor of one
        # dimension is not, where CUDA rounds one of none. With ``out`` CUDA makes no wide copy.
        scaled = torch.mul(dhidden, dtotal.view(1), out=torch.empty_like(dhidden))
        return scaled, (dweight * dtotal).to(ctx.weight_dtype), None, None, None, None, None


def _block(scores: Scores, z_loss: float, differentiate: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of one block of rows and the gradient of its logits (unused memory when not differentiating)."""
    log_p, valid = scores.log_p, scores.valid.to(scores.nll.dtype)
    loss = ((scores.nll + z_loss * scores.log_partition.square()) * valid).sum()
    if differentiate:
        # d loss / d logits = p (1 + 2 z lse) - onehot(label), zero for ignored rows
        log_p.exp_().mul_((1 + 2 * z_loss * scores.log_partition) * valid)
        log_p.scatter_add_(-1, scores.column, -scores.owned.to(log_p.dtype))
    return loss, log_p.to(dtype)
