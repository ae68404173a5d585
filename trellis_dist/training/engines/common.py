"""The step, the evaluation and the handover to checkpoints that all engines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from trellis_dist.training import collectives
from trellis_dist.training.engines.accumulation import accumulate
from trellis_dist.training.engines.base import (
    EngineOptions,
    Inspector,
    LossModule,
    StepResult,
    TokenLosses,
)
from trellis_dist.training.engines.fragments import (
    Fragment,
    check_names,
    fragment_tensors,
    held_parameters,
    load_moments,
    load_weights,
    slices,
    weight_tensors,
)
from trellis_dist.training.optimizer import set_step_count

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader
    from data_pipeline.loader import Batch

__all__ = ["CommonEngine"]


class CommonEngine(ABC):
    """An engine but for how its library runs, reduces, updates and divides."""

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        """Move ``model`` to its device and note what this rank holds of it."""
        self.model = model.to(options.mesh.device)
        self.optimizer_steps = 0
        self.inspector: Inspector | None = None
        self.before_update: Callable[[], None] | None = None
        self.enter: Callable[[str], None] | None = None
        self._options, self._mesh = options, options.mesh
        self._held = held_parameters(model)
        self._loss = LossModule(self.model, segments=options.segments, states=options.states)
        self.forward_module: nn.Module = self._loss
        self.token_losses: TokenLosses | None = None
        # The library's wrapper of ``_loss``, where it has one.
        self._module: nn.Module = self._loss
        # Whether every rank holds its local tensors whole: the weights, whatever becomes of their masters.
        self._whole_weights = True

    def train_step(self, batches: Sequence[Batch], *, lr: float, valid_tokens: int) -> StepResult:
        """Accumulate over ``batches`` and apply one update; a non-finite loss or gradient is skipped."""
        scale = self._averaged_over() / valid_tokens
        self._enter("forward and backward passes")
        self._begin(len(batches))
        total = accumulate(
            batches,
            forward=self._forward,
            backward=lambda loss, last: self._named_backward(loss * scale, last=last),
            forwards_first=self._options.forwards_first,
        )
        self._enter("sum of the losses")  # the first thing that waits for the slowest rank
        # All tp ranks see the same tokens.
        loss = collectives.sum_scalars([float(total)])[0] / (self._mesh.tp * valid_tokens)
        self._enter("reduction of the gradients")
        with record_function("reduction of the gradients"):
            self._reduce()
        if self.inspector is not None:
            self.inspector(list(self._gradients()))
        if self.before_update is not None:
            self._enter("copies of a save")
            self.before_update()
        self._enter("update of the weights")
        with record_function("update of the weights"):
            result = self._update(loss, lr)
        self.optimizer_steps += result.applied
        if self._options.states is not None and not result.applied:
            self._options.states.forget()
        return result

    def _enter(self, operation: str) -> None:
        if self.enter is not None:
            self.enter(operation)

    def _forward(self, batch: Batch) -> Tensor:
        with record_function("forward"):
            loss: Tensor = self._module(batch, self._mesh.device, self._options.z_loss)
        return loss

    def _named_backward(self, loss: Tensor, *, last: bool) -> None:
        with record_function("backward"):
            self._backward(loss, last=last)

    def _averaged_over(self) -> int:
        """Ranks whose gradients the library averages where the contract sums."""
        return 1

    def _begin(self, micro_batches: int) -> None:  # noqa: B027 - most engines have nothing to do
        """Get ready for a step."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradients; ``last`` of this step."""

    @abstractmethod
    def _reduce(self) -> None:
        """Complete what the library left to do: fragments then hold the gradient of the whole mesh."""

    @abstractmethod
    def _update(self, loss: float, lr: float) -> StepResult:
        """Measure, clip and apply the gradient, or drop it when it or ``loss`` is not finite."""

    @abstractmethod
    def _fragments(self, *, gradients: bool = False) -> Iterator[Fragment]:
        """Yield the optimizer state on this rank, with ``gradients`` between ``_reduce`` and ``_update``."""

    @abstractmethod
    def _optimized(self) -> tuple[torch.optim.Optimizer, Sequence[Tensor]]:
        """The torch optimizer and the tensors its state belongs to."""

    def _writes_fragments(self) -> bool:
        """Whether no other rank writes the fragments of this one."""
        return self._mesh.dp_rank == 0 and self._mesh.sp_rank == 0

    def _loaded(self) -> None:  # noqa: B027 - most engines keep no copies
        """Spread weights that were loaded into fragments to where the library keeps copies of them."""

    def _gradients(self) -> Iterator[LogicalTensor]:
        for part in self._fragments(gradients=True):
            assert part.gradient is not None, "an engine shows the gradient of every fragment"
            yield from slices("gradient", part.held, part.start, part.gradient.float())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (sum of token losses without the z-loss, valid tokens of the whole rows)."""
        total, tokens = torch.zeros((), dtype=torch.float64, device=self._mesh.device), 0
        self._loss.token_losses = self.token_losses
        try:
            for batch in batches:
                total += self._module(batch, self._mesh.device, 0.0).double()
                tokens += batch.valid_tokens
        finally:
            self._loss.token_losses = None
        return float(total), tokens

    def own_weights(self) -> Iterator[Tensor]:
        """Yield fp32 weights [n], flat views: over all ranks every trained weight exactly once."""
        for part in self._fragments() if self._writes_fragments() else ():
            if part.held.written_by(self._mesh):
                yield part.master.detach()

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield this rank's slices of weights, fp32 masters (where they differ), moments and row states."""
        if self._whole_weights:
            yield from weight_tensors(self._held, self._mesh)
        if self._writes_fragments():
            yield from fragment_tensors(
                self._fragments(),
                self._mesh,
                weights=not self._whole_weights,
                masters=self._separate_masters(),
            )
        if self._options.states is not None:
            yield from self._options.states.logical_tensors()

    def _separate_masters(self) -> bool:
        """Whether masters hold more digits than the weights."""
        return self._options.bf16

    def load_weights(self, reader: CheckpointReader) -> None:
        """Take over weights alone; each rank reads what it holds."""
        # Agreed upon first: what follows is a collective in engines that divide weights.
        collectives.together(lambda: self._read_weights(reader), what="reading the weights")
        self._loaded()

    def _read_weights(self, reader: CheckpointReader) -> None:
        check_names(reader, [item.name for item in self._held])
        load_weights(reader, self._held, self._fragments(), whole=self._whole_weights)

    def load(self, reader: CheckpointReader, *, optimizer_steps: int) -> None:
        """Restore the state any engine saved; each rank reads what it holds."""
        what = "reading the checkpoint"
        collectives.together(lambda: self._read_all(reader, optimizer_steps), what=what)
        self._loaded()
        self.optimizer_steps = optimizer_steps

    def _read_all(self, reader: CheckpointReader, optimizer_steps: int) -> None:
        self._read_weights(reader)
        set_step_count(*self._optimized(), optimizer_steps)
        load_moments(reader, self._fragments())
        if self._options.states is not None:
            self._options.states.load(reader)
