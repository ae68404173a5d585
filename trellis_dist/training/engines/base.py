"""What the loop asks of an engine; every engine follows the same gradient contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from trellis_dist.models.context import document_starts
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.config import OptimizerConfig

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader
    from data_pipeline.loader import Batch
    from trellis_dist.parallel.segments import Segments
    from trellis_dist.training.carry import RowStates

__all__ = ["Engine", "EngineOptions", "Inspector", "LossModule", "StepResult", "TokenLosses"]

Inspector = Callable[[list["LogicalTensor"]], None]
# Takes labels [B, L], positions [B, L] inside their documents, and losses [B, L] of what was evaluated.
TokenLosses = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What every engine is built from, beside the model.

    Attributes:
        optimizer: the recipe's section.
        mesh: this rank's place; the model has been split over its tp and sp by ``apply_parallelism``.
        segments: what ``apply_parallelism`` returned; needed with sp > 1.
        bf16: bf16 weights and compute, with fp32 master weights.
        z_loss: weight of the mean squared log-partition.
        offload: optimizer state and master weights in host memory, updated there.
        forwards_first: micro-batches whose forward passes run before their backward passes.
        persistence_threshold: at ZeRO 3, parameters of fewer elements stay whole on every rank.
        states: what rows hand to the rows after them; None: every row starts anew.
    """

    optimizer: OptimizerConfig
    mesh: Mesh
    segments: Segments | None = None
    bf16: bool = False
    z_loss: float = 0.0
    offload: bool = False
    forwards_first: int = 1
    persistence_threshold: int = 100_000
    states: RowStates | None = None


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

    The contract (docs: parallelism, "gradient contract"): the local loss is the token *sum* over
    N = ``valid_tokens`` of the whole global batch (times dp where a library averages over dp), so however the
    batch is split over micro-batches, replicas, sequence segments and tensor shards, the gradient is that of
    the mean over all its valid tokens.

    Attributes:
        model: the module that trains; its parameters may be replaced by the engine's.
        optimizer_steps: updates applied, those of earlier starts included.
        inspector: when set, called once per step with this rank's slices "gradient/<parameter>": reduced over
            all ranks, not clipped yet, of the mean over the tokens. For tests and debugging.
        before_update: when set, called in every step before weights and optimizer state change.
        enter: when set, told what a step does next, in words.
        forward_module: what is called once per micro-batch, whole; for hooks that measure.
        token_losses: when set, ``evaluate`` gives it the loss of every token of this rank.
    """

    model: nn.Module
    optimizer_steps: int
    inspector: Inspector | None
    before_update: Callable[[], None] | None
    enter: Callable[[str], None] | None
    forward_module: nn.Module
    token_losses: TokenLosses | None

    def train_step(self, batches: Sequence[Batch], *, lr: float, valid_tokens: int) -> StepResult:
        """Accumulate over ``batches`` (this rank's micro-batches) and apply one update at rate ``lr``."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (nats summed over this rank's tokens, valid tokens of its whole rows), without gradients.

        Over the ranks of one tensor shard the first sums to the total; the second counts each row once per
        sequence rank. Where weights are divided over dp, all ranks must bring equally many batches.
        """
        ...

    def own_weights(self) -> Iterator[Tensor]:
        """Yield fp32 weights [n], flat views: over all ranks every trained weight exactly once."""
        ...

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield what this rank writes to a checkpoint: the slices of weights, masters and moments it owns."""
        ...

    def load(self, reader: CheckpointReader, *, optimizer_steps: int) -> None:
        """Restore weights, masters, moments and row states that any engine wrote on any mesh.

        Raises ``ValueError`` when one is missing or has another shape.
        """
        ...

    def load_weights(self, reader: CheckpointReader) -> None:
        """Take over weights alone, from "master/..." where there are some; the optimizer stays as it is.

        Raises ``ValueError`` when the checkpoint has other weights than the model, or of other shapes.
        """
        ...


class LossModule(nn.Module):
    """The forward pass as one call, because wrappers hook ``forward`` and nothing else."""

    def __init__(self, model: Any, *, segments: Segments | None, states: RowStates | None = None) -> None:
        """Hold ``model``; ``segments`` cuts each batch when the sequence is split over ranks."""
        super().__init__()
        self.model: Any = model
        self._segments, self._states = segments, states
        self.token_losses: TokenLosses | None = None

    def forward(self, batch: Batch, device: torch.device, z_loss: float) -> Tensor:
        """Return the sum of the token losses of this rank's part of ``batch`` (fp32 scalar)."""
        parts = (batch.tokens, batch.labels, batch.cu_seqlens)
        # Right before the forward pass: the split layers ask about the batch that was cut last.
        cut = parts if self._segments is None else self._segments.cut(*parts)
        tokens, labels, cu_seqlens = (x if x is None else x.to(device, non_blocking=True) for x in cut)
        # An evaluation between two steps must leave the states alone.
        states = self._states if torch.is_grad_enabled() else None
        carry = None if states is None else states.enter(batch)
        options: dict[str, Any] = {} if carry is None else {"carry": carry}
        if self.token_losses is not None:
            options["each"] = torch.zeros(cut[1].numel(), dtype=torch.float32, device=device)
        loss: Tensor = self.model.loss_sum(tokens, labels, cu_seqlens=cu_seqlens, z_loss=z_loss, **options)
        if self.token_losses is not None:
            each, places = options["each"].view_as(cut[1]), self._positions(batch).to(device)
            self.token_losses(cut[1].to(device), places, each)
        if states is not None and carry is not None:
            states.leave(batch, carry)
        return loss

    def _positions(self, batch: Batch) -> Tensor:
        """Tokens before each token of this rank's part [B, L] in its document, which a row's start begins."""
        rows, length = batch.tokens.shape
        starts = document_starts(batch.cu_seqlens, rows=rows, length=length)
        lengths = torch.cat([starts, starts.new_tensor([rows * length])]).diff()
        whole = (torch.arange(rows * length) - starts.repeat_interleave(lengths)).view(rows, length)
        if self._segments is None or self._segments.mesh.sp == 1:
            return whole
        mesh = self._segments.mesh
        return whole.chunk(mesh.sp, dim=1)[mesh.sp_rank]
