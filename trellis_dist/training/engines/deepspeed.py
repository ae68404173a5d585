"""Data-parallel training through DeepSpeed: ZeRO stage 0 (replicated state) and 1 (partitioned state)."""

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

from trellis_dist.training import collectives
from trellis_dist.training.config import OptimizerConfig
from trellis_dist.training.engines.base import LossModule, StepResult
from trellis_dist.training.engines.fragments import (
    Fragment,
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

__all__ = ["DeepSpeedEngine"]


class DeepSpeedEngine:
    """DeepSpeed over the default process group.

    DeepSpeed averages gradients over dp, so the local loss is multiplied by dp; it would also divide by the
    accumulation count, which ``scale_wrt_gas=False`` switches off. Learning rate and clipping of stage 0 are
    ours; stage 1 clips inside ZeRO, where the partitions are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerConfig,
        device: torch.device,
        zero_stage: int,
        bf16: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        """Wrap ``model`` as ``check_engine`` allows."""
        assert not bf16 or zero_stage == 1, "stage 0 keeps no fp32 masters of bf16 weights"
        self.model = model.to(device)
        self.optimizer_steps = 0
        self._device, self._stage, self._bf16 = device, zero_stage, bf16
        self._clip_norm = optimizer.clip_norm
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        initial = {name: p.detach().float().clone() for name, p in self._named} if bf16 else {}
        self._base = build_optimizer(parameter_groups(self._named, optimizer.weight_decay), optimizer)
        config = _deepspeed_config(stage=zero_stage, bf16=bf16, clip_norm=optimizer.clip_norm)
        self._loss = LossModule(self.model, z_loss=z_loss, segments=None)
        self._engine = _initialize(self._loss, self._base, config)
        self._keep_initial_digits(initial)

    @torch.no_grad()
    def _keep_initial_digits(self, initial: dict[str, Tensor]) -> None:
        """Put the fp32 initial weights into the masters, which DeepSpeed fills from the bf16 copies."""
        for fragment in self._fragments() if initial else ():
            end = fragment.start + fragment.master.numel()
            fragment.master.copy_(initial[fragment.name].view(-1)[fragment.start : end])

    def train_step(self, batches: Sequence[Batch], *, lr: float, valid_tokens: int) -> StepResult:
        """Accumulate over ``batches`` and apply one update; a non-finite loss or gradient is skipped."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        scale = dist.get_world_size() / valid_tokens
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = self._engine(batch, self._device)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        mean = collectives.sum_scalars([float(total)])[0] / valid_tokens
        set_learning_rate(self._base, lr)
        result = self._step_replicated(mean) if self._stage == 0 else self._step_partitioned(mean)
        self.optimizer_steps += result.applied
        return result

    def _step_replicated(self, loss: float) -> StepResult:
        """Stage 0: gradients are whole and averaged on every rank, the optimizer is plain torch."""
        gradients = complete_gradients([p for _, p in self._named])
        result = StepResult.judge(loss=loss, grad_norm=clip_gradients(gradients, self._clip_norm))
        if result.applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return result

    def _step_partitioned(self, loss: float) -> StepResult:
        """Stage 1: ZeRO measures the norm and skips a non-finite gradient, on all ranks together."""
        if not StepResult.judge(loss=loss, grad_norm=0.0).applied:
            self._poison_gradients()
        self._engine.step()
        return StepResult.judge(loss=loss, grad_norm=float(self._engine.get_global_grad_norm()))

    def _poison_gradients(self) -> None:
        """Make ZeRO skip an update whose loss is not finite though its gradient is (an infinite logit)."""
        optimizer = self._engine.optimizer
        if self._bf16:
            optimizer.fp32_groups_gradients_flat[0].fill_(float("nan"))
            return
        for gradients in optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(float("nan"))

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Return (nats, valid tokens) of this rank's batches, without gradients."""
        return self._loss.evaluate(batches, self._device)

    def _fragments(self) -> Iterator[Fragment]:
        """Yield the optimizer state this rank holds: everything at stage 0, its partition at stage 1."""
        if self._stage == 0:
            yield from whole_fragments(self._named, dict(self._named), self._base)
            return
        for name, parameter in self._named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                start = mapping.lp_fragment_address.start
                yield Fragment(name, parameter.numel(), start, mapping.hp_fragment, self._moments(mapping))

    def _moments(self, mapping: Any) -> dict[str, Tensor]:
        """Views of one fragment's moments in the flat partition's state.

        Not ``mapping.optim_fragment``: DeepSpeed 0.19 links it after the first parameter group's first step,
        when later groups have no state yet, and never again.
        """
        (flat,) = self._base.param_groups[mapping.param_group_index]["params"]
        state, address = self._base.state.get(flat, {}), mapping.hp_fragment_address
        held = (key for key in ("exp_avg", "exp_avg_sq") if key in state)
        return {key: state[key].narrow(0, address.start, address.numel) for key in held}

    def logical_tensors(self) -> Iterator[LogicalTensor]:
        """Yield the weights (rank 0) and the optimizer state this rank owns."""
        first = dist.get_rank() == 0
        if first:
            yield from weight_tensors(self._named)
        if first or self._stage > 0:
            yield from fragment_tensors(self._fragments(), masters=self._bf16)

    def load(self, reader: CheckpointReader, *, optimizer_steps: int) -> None:
        """Restore the state any engine saved; each rank reads the moments of its own partition."""
        load_weights(reader, self._named, self._fragments())
        set_step_count(self._base, optimizer_steps)
        load_moments(reader, self._fragments())
        self.optimizer_steps = optimizer_steps


def _deepspeed_config(*, stage: int, bf16: bool, clip_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's settings. Batch sizes are formal: the boundary is set by hand at each backward."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "gradient_clipping": clip_norm if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Reduction at the accumulation boundary only; overlapped reduction would tie sequence ranks together.
        "zero_optimization": {"stage": stage, "overlap_comm": False, "contiguous_gradients": False},
    }


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
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
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine
