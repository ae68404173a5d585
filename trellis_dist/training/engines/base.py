"""What the loop asks of an engine; every engine follows the same gradient contract."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader
    from data_pipeline.loader import Batch
    from trellis_dist.parallel.segments import Segments

__all__ = ["Engine", "LossModule", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as every rank sees it.

    Attributes:
        loss: mean over the valid tokens of the global batch (nats per token, z-loss included).
        grad_norm: L2 norm of the whole gradient before clipping; non-finite when the step was skipped for it.
        applied: False when loss or gradient was not finite and the weights were left alone.
    """

    loss: float
    grad_norm: float
    applied: bool

    @classmethod
    def judge(cls, *, loss: float, grad_norm: float) -> StepResult:
        """Decide from numbers that are equal on all ranks, so that all ranks decide alike."""
        return cls(loss, grad_norm, math.isfinite(loss) and math.isfinite(grad_norm))


class Engine(Protocol):
    """A model, its optimizer and the collectives between their ranks.

    The contract (docs: parallelism, "gradient contract"): the local loss is the token *sum* times dp / N with
    N = ``valid_tokens`` of the whole global batch, so however the batch is split over micro-batches, replicas
    and sequence segments, the gradient is that of the mean over all its valid tokens.
    """

    model: nn.Module
    optimizer_steps: int

    def train_step(self, batches: Sequence[Batch], *, lr: float, valid_tokens: int) -> StepResult:
        """Accumulate over ``batches`` (this rank's micro-batches) and apply one update at rate ``lr``."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (nats summed over this rank's tokens, valid tokens of its whole rows), without gradients.

        Summed over all ranks the first is the total; the second counts each row once per sequence rank.
        """
        ...

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield what this rank writes to a checkpoint: weights, and flat masters and moments it owns."""
        ...

    def load(self, reader: CheckpointReader, *, optimizer_steps: int) -> None:
        """Restore weights, masters and moments that any engine wrote; ``ValueError`` when one is missing."""
        ...


class LossModule(nn.Module):
    """The forward pass as one call, because wrappers such as DeepSpeed hook ``forward`` and nothing else."""

    def __init__(self, model: Any, *, z_loss: float, segments: Segments | None) -> None:
        """Hold ``model``; ``segments`` cuts each batch when the sequence is split over ranks."""
        super().__init__()
        self.model: Any = model
        self._z_loss = z_loss
        self._segments = segments

    def forward(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the sum of the token losses of this rank's part of ``batch`` (fp32 scalar)."""
        return self._loss(batch, device, self._z_loss)

    def _loss(self, batch: Batch, device: torch.device, z_loss: float) -> Tensor:
        parts = (batch.tokens, batch.labels, batch.cu_seqlens)
        # Right before the forward pass: the split layers ask about the batch that was cut last.
        cut = parts if self._segments is None else self._segments.cut(*parts)
        tokens, labels, cu_seqlens = (x if x is None else x.to(device, non_blocking=True) for x in cut)
        loss: Tensor = self.model.loss_sum(tokens, labels, cu_seqlens=cu_seqlens, z_loss=z_loss)
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
        """Return (sum of token losses without the z-loss, valid tokens of the whole rows)."""
        total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in batches:
            total += self._loss(batch, device, 0.0).double()
            tokens += batch.valid_tokens
        return float(total), tokens
