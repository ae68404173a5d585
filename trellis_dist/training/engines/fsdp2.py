"""Training through torch's fully_shard (FSDP2): weights, gradients and optimizer state divided over dp."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis_dist.parallel import env
from trellis_dist.parallel.gradients import sum_sequence_gradients, sum_tensor_gradients
from trellis_dist.training.engines.base import EngineOptions, StepResult
from trellis_dist.training.engines.common import CommonEngine
from trellis_dist.training.engines.fragments import Fragment, Held
from trellis_dist.training.engines.gradients import clip_gradients, complete_gradients
from trellis_dist.training.optimizer import build_optimizer, keep_tags, parameter_groups, set_learning_rate

if TYPE_CHECKING:
    from data_pipeline.loader import Batch

__all__ = ["Fsdp2Engine"]


class Fsdp2Engine(CommonEngine):
    """One fully_shard unit per block and one for the rest, on a mesh of the dp axis alone.

    FSDP averages over dp, so the local loss is multiplied by dp. It reduces after every micro-batch: reducing
    at the accumulation boundary only would keep a whole gradient on every rank, which is what sharding is to
    avoid, and within dp no rank waits for another segment. Over sp this engine sums the shards, once per
    step. (FSDP on a mesh of sp and dp would all-reduce over sp in every layer.)

    The sharded parameters are the fp32 masters; with bf16 the gathered copies are bf16, and gradients are
    reduced in fp32.
    """

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        """Shard ``model``; its parameters become DTensors."""
        super().__init__(model, options)
        self._whole_weights = False
        before = {item.name: item.parameter for item in self._held}
        self._group = self._mesh.dp_group or env.alone()
        self._module = _shard(self._loss, self._group, options)
        after = dict(self.model.named_parameters())
        self._held = [_replaced(item, after[item.name], before[item.name]) for item in self._held]
        named = [(item.name, item.parameter) for item in self._held]
        groups = parameter_groups(named, options.optimizer.weight_decay)
        self._optimizer = build_optimizer(groups, options.optimizer)

    def _averaged_over(self) -> int:
        return self._mesh.dp

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._module.set_is_last_backward(last)  # type: ignore[operator]
        loss.backward()

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """As ``CommonEngine.evaluate``; a forward pass alone would leave the root's weights gathered."""
        found = super().evaluate(batches)
        self._module.reshard()  # type: ignore[operator]
        return found

    def _reduce(self) -> None:
        complete_gradients(item.parameter for item in self._held)
        pairs = self._pairs()
        sum_sequence_gradients([gradient for _, gradient in pairs], self._mesh)
        sum_tensor_gradients(pairs, self._mesh)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(item.parameter, _local(item.parameter.grad)) for item in self._held]

    def _update(self, loss: float, lr: float) -> StepResult:
        clip_norm = self._options.optimizer.clip_norm
        norm = clip_gradients(self._pairs(), clip_norm=clip_norm, mesh=self._mesh, shards=self._group)
        result = StepResult.judge(loss=loss, grad_norm=norm)
        if result.applied:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return result

    def _fragments(self, *, gradients: bool = False) -> Iterator[Fragment]:
        for item in self._held:
            start = _first_row(item, self._mesh.dp, self._mesh.dp_rank) * _row_size(item)
            state = self._optimizer.state.get(item.parameter, {})
            moments = {key: _flat(state[key]) for key in ("exp_avg", "exp_avg_sq") if key in state}
            gradient = _flat(item.parameter.grad) if gradients else None
            yield Fragment(item, start, _flat(item.parameter), moments, gradient)

    def _optimized(self) -> tuple[torch.optim.Optimizer, Sequence[Tensor]]:
        return self._optimizer, [item.parameter for item in self._held]

    def _separate_masters(self) -> bool:
        return False

    def _writes_fragments(self) -> bool:
        return self._mesh.sp_rank == 0


def _shard(loss: nn.Module, group: dist.ProcessGroup, options: EngineOptions) -> nn.Module:
    """Divide the parameters under ``loss`` over ``group``."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    device = options.mesh.device.type
    settings: dict[str, Any] = {"mesh": DeviceMesh.from_group(group, device, mesh_dim_names=("dp",))}
    if options.bf16:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if options.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device == "cuda")
    for block in getattr(loss.model, "blocks", ()):
        fully_shard(block, **settings)
    fully_shard(loss, **settings)  # gives the module, in place, a class with the hooks
    return loss


def _replaced(item: Held, new: nn.Parameter, old: nn.Parameter) -> Held:
    return dataclasses.replace(item, parameter=keep_tags(new, old))


def _local(value: Any) -> Tensor:
    """This rank's rows of a DTensor."""
    local: Tensor = value.detach().to_local()
    return local


def _flat(value: Any) -> Tensor:
    return _local(value).view(-1)


def _first_row(item: Held, ranks: int, rank: int) -> int:
    """FSDP cuts the first dimension as torch.chunk does: ceil(rows / ranks) each, the last ones fewer."""
    return min(item.shape[0], rank * -(-item.shape[0] // ranks))


def _row_size(item: Held) -> int:
    return math.prod(item.shape[1:])
