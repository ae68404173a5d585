"""Training in plain torch on one device; needs neither DeepSpeed nor a process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trellis_dist.parallel.gradients import sum_sequence_gradients
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training import collectives
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.engines.base import LossModule, StepResult
from trellis_dist.training.engines.fragments import (
    fragment_tensors,
    load_moments,
    load_weights,
    weight_tensors,
    whole_fragments,
)
from trellis_dist.training.engines.gradients import clip_gradients, complete_gradients
from trellis_dist.training.optimizer import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
    set_step_count,
)

if TYPE_CHECKING:
    from checkpoints.logical import LogicalTensor
    from checkpoints.state import CheckpointReader
    from data_pipeline.loader import Batch
    from trellis_dist.parallel.segments import Segments

__all__ = ["LocalEngine"]


class LocalEngine:
    """Whole weights and optimizer state on one device; sequence ranks sum their gradients once per step.

    In bf16 the module's parameters are bf16 copies of fp32 masters; gradients are accumulated in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerConfig,
        device: torch.device,
        bf16: bool = False,
        z_loss: float = 0.0,
        mesh: Mesh | None = None,
        segments: Segments | None = None,
    ) -> None:
        """Wrap ``model``, on one rank or (with ``segments`` from apply_parallelism) on sequence ranks."""
        self.model = model.to(device)
        self.optimizer_steps = 0
        self._device = device
        self._bf16 = bf16
        self._clip_norm = optimizer.clip_norm
        self._mesh = mesh or Mesh(device=device)
        self._named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._masters = self._make_masters()
        self._loss = LossModule(self.model, z_loss=z_loss, segments=segments)
        groups = parameter_groups(self._masters.items(), optimizer.weight_decay)
        self._optimizer = build_optimizer(groups, optimizer)

    def _make_masters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer updates: the parameters themselves, or fp32 masters of bf16 ones."""
        if not self._bf16:
            return dict(self._named)
        masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in self._named}
        self.model.to(torch.bfloat16)
        for name, parameter in self._named:
            parameter.register_post_accumulate_grad_hook(_accumulate_into(masters[name]))
        return masters

    def train_step(self, batches: Sequence[Batch], *, lr: float, valid_tokens: int) -> StepResult:
        """Accumulate over ``batches`` and apply one update; a non-finite loss or gradient is skipped."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in batches:
            loss = self._loss(batch, self._device)
            (loss / valid_tokens).backward()
            total += loss.detach()
        gradients = complete_gradients(self._masters.values())
        sum_sequence_gradients(gradients, self._mesh)
        grad_norm = clip_gradients(gradients, self._clip_norm)
        mean = collectives.sum_scalars([float(total)])[0] / valid_tokens
        result = StepResult.judge(loss=mean, grad_norm=grad_norm)
        if result.applied:
            self._update(lr)
        self._optimizer.zero_grad(set_to_none=True)
        return result

    def _update(self, lr: float) -> None:
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self.optimizer_steps += 1
        if self._bf16:
            with torch.no_grad():
                torch._foreach_copy_([p for _, p in self._named], list(self._masters.values()))

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (nats, valid tokens) of this rank's batches, without gradients."""
        return self._loss.evaluate(batches, self._device)

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield weights, fp32 masters (bf16 only) and Adam moments."""
        if self._mesh.rank == 0:
            yield from weight_tensors(self._named)
            fragments = whole_fragments(self._named, self._masters, self._optimizer)
            yield from fragment_tensors(fragments, masters=self._bf16)

    def load(self, reader: CheckpointReader, *, optimizer_steps: int) -> None:
        """Restore the state any engine saved."""
        load_weights(reader, self._named, whole_fragments(self._named, self._masters, self._optimizer))
        set_step_count(self._optimizer, optimizer_steps)
        load_moments(reader, whole_fragments(self._named, self._masters, self._optimizer))
        self.optimizer_steps = optimizer_steps


def _accumulate_into(master: nn.Parameter):  # type: ignore[no-untyped-def]
    """Make the hook that moves a bf16 gradient into its fp32 master's and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None, "a post-accumulate hook runs after the gradient is there"
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return hook
