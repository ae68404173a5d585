"""Training in plain torch: whole weights and optimizer state on every rank of a tensor shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trellis_dist.parallel.gradients import sum_replica_gradients, sum_tensor_gradients
from trellis_dist.training.engines.base import EngineOptions, StepResult
from trellis_dist.training.engines.common import CommonEngine
from trellis_dist.training.engines.fragments import Fragment, whole_fragments
from trellis_dist.training.engines.gradients import clip_gradients
from trellis_dist.training.optimizer import build_optimizer, keep_tags, parameter_groups, set_learning_rate

__all__ = ["LocalEngine"]


class LocalEngine(CommonEngine):
    """Sums its gradients over dp x sp once per step; needs neither DeepSpeed nor, alone, a process group.

    In bf16 the module's parameters are bf16 copies of fp32 masters, and gradients are accumulated in fp32.
    With offload the masters are in host memory: gradients go there when they are reduced and clipped, updated
    weights come back. (On a CPU the masters are separate too, so that it is the same path.)
    """

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        """Wrap ``model``, on one rank or on the ranks of ``options.mesh``."""
        super().__init__(model, options)
        self._masters = self._make_masters()
        # This step's gradients, on the device; in bf16 hooks add to them, in fp32 they are the parameters'.
        self._sums: dict[str, Tensor] = {}
        groups = parameter_groups(self._masters.items(), options.optimizer.weight_decay)
        self._optimizer = build_optimizer(groups, options.optimizer)

    def _make_masters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer updates: the parameters themselves, or fp32 masters of them."""
        if not (self._options.bf16 or self._options.offload):
            return {item.name: item.parameter for item in self._held}
        where = torch.device("cpu") if self._options.offload else self._mesh.device
        masters = {}
        for item in self._held:
            data = item.parameter.detach().to(device=where, dtype=torch.float32, copy=True)
            masters[item.name] = keep_tags(nn.Parameter(data), item.parameter)
        if self._options.bf16:
            self.model.to(torch.bfloat16)
            for item in self._held:
                item.parameter.register_post_accumulate_grad_hook(self._accumulate_into(item.name))
        return masters

    def _accumulate_into(self, name: str):  # type: ignore[no-untyped-def]
        """Make the hook that adds a bf16 gradient to its fp32 sum and frees it."""

        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None, "a post-accumulate hook runs after the gradient is there"
            gradient = parameter.grad.float()
            self._sums[name] = self._sums[name].add_(gradient) if name in self._sums else gradient
            parameter.grad = None

        return hook

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def _reduce(self) -> None:
        for item in self._held:
            if item.name not in self._sums:
                gradient = item.parameter.grad
                unused = torch.zeros_like(item.parameter, dtype=torch.float32)
                self._sums[item.name] = unused if gradient is None else gradient
        # In the model's order, which hooks need not follow: all ranks must pass the same list.
        self._sums = {item.name: self._sums[item.name] for item in self._held}
        sum_replica_gradients(self._sums.values(), self._mesh)
        sum_tensor_gradients(self._pairs(), self._mesh)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(item.parameter, self._sums[item.name]) for item in self._held]

    def _update(self, loss: float, lr: float) -> StepResult:
        norm = clip_gradients(self._pairs(), clip_norm=self._options.optimizer.clip_norm, mesh=self._mesh)
        result = StepResult.judge(loss=loss, grad_norm=norm)
        if result.applied:
            for name, master in self._masters.items():
                master.grad = self._sums[name].to(master.device)
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            self._copy_back()
        self._sums = {}
        self._optimizer.zero_grad(set_to_none=True)
        for item in self._held:
            item.parameter.grad = None
        return result

    @torch.no_grad()
    def _copy_back(self) -> None:
        """Weights that are not the masters take their values."""
        if self._options.bf16 or self._options.offload:
            weights: list[Tensor] = [item.parameter for item in self._held]
            torch._foreach_copy_(weights, list(self._masters.values()))

    def _fragments(self, *, gradients: bool = False) -> Iterator[Fragment]:
        return whole_fragments(self._held, self._masters, self._optimizer, self._sums if gradients else None)

    def _optimized(self) -> tuple[torch.optim.Optimizer, Sequence[Tensor]]:
        return self._optimizer, list(self._masters.values())
