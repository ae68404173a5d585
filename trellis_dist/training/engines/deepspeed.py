"""Training through DeepSpeed: ZeRO stage 0 (replicated state) to 3 (state, gradients and weights divided)."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis_dist.training.engines.base import EngineOptions, StepResult
from trellis_dist.training.engines.common import CommonEngine
from trellis_dist.training.engines.fragments import Fragment, whole_fragments
from trellis_dist.training.engines.gradients import clip_gradients, complete_gradients
from trellis_dist.training.engines.hooks import GradientOrder, TensorSums
from trellis_dist.training.engines.mpu import ModelParallelUnit
from trellis_dist.training.engines.zero_state import (
    drop_gradients,
    flat_state,
    poison_gradients,
    refresh_gathered,
    zero_fragments,
)
from trellis_dist.training.optimizer import build_optimizer, parameter_groups, set_learning_rate

if TYPE_CHECKING:
    from data_pipeline.loader import Batch

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine(CommonEngine):
    """ZeRO over dp x sp.

    DeepSpeed averages gradients over dp and sums them over its sequence-parallel group (our sp), so the local
    loss is multiplied by dp; it would also divide by the accumulation count, which ``scale_wrt_gas=False``
    switches off. Learning rate and clipping of stage 0 are ours; the others clip inside ZeRO, where the
    partitions are.
    """

    def __init__(self, model: nn.Module, options: EngineOptions, *, zero_stage: int) -> None:
        """Wrap ``model`` as ``check_engine`` allows."""
        assert not options.bf16 or zero_stage > 0, "stage 0 keeps no fp32 masters of bf16 weights"
        super().__init__(model, options)
        self._stage = zero_stage
        self._whole_weights = zero_stage < 3
        initial = {h.name: h.parameter.detach().float().clone() for h in self._held} if options.bf16 else {}
        named = [(item.name, item.parameter) for item in self._held]
        self._base = build_optimizer(
            parameter_groups(named, options.optimizer.weight_decay), options.optimizer
        )
        self._engine = _initialize(self._loss, self._base, options, zero_stage)
        self._module = self._engine
        if zero_stage == 3:
            self._register_direct_parameters()
        self._tensor_sums = TensorSums(self._held, self._mesh)
        self._order: GradientOrder | None = None
        self._first_step, self._micro_batches = True, 0
        self._keep_initial_digits(initial)

    def _register_direct_parameters(self) -> None:
        """Have ZeRO 3 gather what ``loss_sum`` uses of the model itself, whose own hooks it goes around."""
        from deepspeed.runtime.zero import register_external_parameter

        for parameter in self.model.parameters(recurse=False):
            register_external_parameter(self._loss, parameter)

    @torch.no_grad()
    def _keep_initial_digits(self, initial: dict[str, Tensor]) -> None:
        """Put the fp32 initial weights into the masters, which DeepSpeed fills from the bf16 copies."""
        for part in self._fragments() if initial else ():
            part.master.copy_(initial[part.held.name].view(-1)[part.start : part.stop])

    def _averaged_over(self) -> int:
        return self._mesh.dp

    def _begin(self, micro_batches: int) -> None:
        self._engine.set_gradient_accumulation_boundary(False)
        self._micro_batches = micro_batches
        if self._first_step and self._stage >= 2:
            self._order = GradientOrder(self._held, self._mesh)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if self._stage > 0:
            # A forward pass tells ZeRO that the backward pass before it is over; where several forward passes
            # came first that was too early, and stage 3 would overwrite the gradient it should add to.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss, scale_wrt_gas=False)

    def _reduce(self) -> None:
        if self._first_step:
            self._tensor_sums.check(self._micro_batches)
            if self._order is not None:
                self._order.check()
            self._first_step = False
        if self._stage == 0:
            complete_gradients(item.parameter for item in self._held)

    def _update(self, loss: float, lr: float) -> StepResult:
        set_learning_rate(self._base, lr)
        return self._update_replicated(loss) if self._stage == 0 else self._update_partitioned(loss)

    def _update_replicated(self, loss: float) -> StepResult:
        """Stage 0: gradients are whole on every rank, the optimizer is plain torch."""
        gradients = [(h.parameter, h.parameter.grad) for h in self._held if h.parameter.grad is not None]
        norm = clip_gradients(gradients, clip_norm=self._options.optimizer.clip_norm, mesh=self._mesh)
        result = StepResult.judge(loss=loss, grad_norm=norm)
        if result.applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return result

    def _update_partitioned(self, loss: float) -> StepResult:
        """Stages 1 to 3: ZeRO measures the norm and skips a non-finite gradient, on all ranks together."""
        if not StepResult.judge(loss=loss, grad_norm=0.0).applied:
            poison_gradients(self._engine.optimizer, self._fragments(gradients=True))
        self._engine.step()
        result = StepResult.judge(loss=loss, grad_norm=float(self._engine.get_global_grad_norm()))
        if not result.applied:
            drop_gradients(self._engine.optimizer)
            refresh_gathered(self._engine.optimizer)
        return result

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (sum of token losses without the z-loss, valid tokens of the whole rows)."""
        self._engine.eval()
        try:
            return super().evaluate(batches)
        finally:
            self._engine.train()

    def _fragments(self, *, gradients: bool = False) -> Iterator[Fragment]:
        if self._stage > 0:
            return zero_fragments(self._engine.optimizer, self._base, self._held, gradients=gradients)
        parameters = {item.name: item.parameter for item in self._held}
        whole = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return whole_fragments(self._held, parameters, self._base, whole if gradients else None)

    def _optimized(self) -> tuple[torch.optim.Optimizer, Sequence[Tensor]]:
        if self._stage == 0:
            return self._base, [item.parameter for item in self._held]
        return self._base, flat_state(self._engine.optimizer, self._base)

    def _writes_fragments(self) -> bool:
        return self._stage > 0 or super()._writes_fragments()

    def _loaded(self) -> None:
        refresh_gathered(self._engine.optimizer)


def _deepspeed_config(options: EngineOptions, stage: int) -> dict[str, Any]:
    """Return DeepSpeed's settings. Batch sizes are formal: the boundary is set by hand at each backward."""
    zero: dict[str, Any] = {
        "stage": stage,
        # Stage 1 reduces at the accumulation boundary only; overlapped reduction would tie sequence ranks
        # together.
        "overlap_comm": False,
        "contiguous_gradients": stage == 3,
        "stage3_param_persistence_threshold": options.persistence_threshold,
        # With it, stage 3 would average over dp x sp where it has to sum over sp.
        "reduce_scatter": options.mesh.sp == 1,
    }
    if options.offload:
        pinned = options.mesh.device.type == "cuda"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "gradient_clipping": options.optimizer.clip_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU Adam is compiled on the machine; torch's needs nothing.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": options.bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer, options: EngineOptions, stage: int
) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # From errors upwards: DeepSpeed logs its whole configuration, and warns about the optimizer that parity
    # tests cover. What a user needs to know (a skipped step, say) the loop prints.
    logger.setLevel(logging.ERROR)
    # ZeRO calls a collective by the name that newer torch deprecates: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # On a CPU it would compile and start a C++ op for inference all-reduces, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a plain process: DeepSpeed needs a group, if only of one
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # Finalise an engine built before this one now: its destructor imports, and when a collection runs it
    # inside one of initialize's imports, Python 3.11's import lock raises KeyError (python/cpython#106176).
    gc.collect()
    config = _deepspeed_config(options, stage)
    # Stage 3 allocates a whole bucket: DeepSpeed's default would be 2 GB of fp32 for the smallest model.
    elements = sum(parameter.numel() for parameter in module.parameters())
    config["zero_optimization"].setdefault("reduce_bucket_size", min(500_000_000, elements))
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=config,
        mpu=ModelParallelUnit(options.mesh, shard_over_replicas=stage == 3),
        dist_init_required=False,
    )
    return engine
