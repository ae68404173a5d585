"""The training, optimizer, schedule and logging sections of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from trellis_dist.validation import STRICT, require

__all__ = ["LoggingConfig", "OptimizerConfig", "ProfileConfig", "ScheduleConfig", "TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay applies to matrices only.

    Attributes:
        kind: "adamw", or "sgd" (no momentum) for parity runs.
        lr: peak learning rate.
        beta1, beta2, eps: Adam's constants.
        weight_decay: decoupled decay of parameters with two or more dimensions.
        clip_norm: global gradient-norm bound; 0 switches clipping off.
    """

    __pydantic_config__ = STRICT

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0,
                f"optimizer.{name} = {value}: use a finite, positive number",
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} = {value}: use [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"optimizer.{name} = {value}: use 0 (off) or a finite number",
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over steps.

    Attributes:
        kind: "cosine" (warm-up, then cosine to ``final_ratio``) or "wsd" (warm-up, stable, linear decay).
        warmup_steps: linear warm-up from 0.
        decay_fraction: share of the steps that "wsd" spends decaying.
        final_ratio: final learning rate over the peak.
    """

    __pydantic_config__ = STRICT

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        require(self.warmup_steps >= 0, f"schedule.warmup_steps = {self.warmup_steps}: use 0 or more steps")
        require(0 < self.decay_fraction <= 1, f"schedule.decay_fraction = {self.decay_fraction}: use (0, 1]")
        require(0 <= self.final_ratio <= 1, f"schedule.final_ratio = {self.final_ratio}: use [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at once, on which engine.

    Attributes:
        steps: optimizer steps.
        global_batch_tokens: tokens per step over the whole mesh; must be a multiple of the sequence length.
        micro_batch: rows per forward pass and data-parallel rank; accumulation follows from
            global rows = micro_batch * accumulation * dp.
        engine: "local" (plain torch, whole optimizer state on every rank), "deepspeed" (ZeRO) or "fsdp2"
            (torch's fully_shard: weights, gradients and optimizer state divided over dp).
        zero_stage: what ZeRO divides over dp x sp: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights
            too; bf16 needs stage 1 or more, which keep fp32 master weights.
        zero3_persistence_threshold: at ZeRO 3, parameters of fewer elements stay whole on every rank.
        activation_checkpointing: what the backward pass computes again instead of keeping it: "none",
            "selective" (everything but matrix products and the memory's scan) or "full" (whole blocks).
        compile: backend of torch.compile, applied block by block: "none", "inductor" or "aot_eager".
        offload_optimizer: keep optimizer state and fp32 master weights in host memory and update them there.
        forwards_first: micro-batches whose forward passes run before their backward passes; with mesh.sp > 1
            more of them wait less for each other's segments, and keep more activations.
        precision: "fp32" or "bf16" (bf16 weights and compute; memories, gates, master weights and optimizer
            state stay fp32). On a CPU "bf16" runs as fp32, and the start-up lines say so.
        z_loss: weight of the mean squared log-partition added to the loss; 0 switches it off.
        seed: initial weights, and the random generators of a first start.
        init_from: a checkpoint, a run or a folder of checkpoints whose weights a new run begins with ("":
            none); its optimizer state, schedule and data are not taken over, and a run that has a checkpoint
            of its own resumes that.
        validation_interval: steps between validation passes; 0 validates only at the end.
        validation_rows: rows per validation pass; 0 uses the whole split.
        threads: torch threads per rank on a CPU; 0 divides the cores among the local ranks.
        max_skipped_steps: consecutive updates that may be skipped for a non-finite loss or gradient; one more
            stops the run.
        spike_action: what a loss spike leads to: "off" (nobody looks), "warn", or "rollback" (back to the
            newest checkpoint before it, and on with the rows after it).
        spike_window: steps whose losses a loss is compared with; nothing is said before so many.
        spike_deviations: how far above their median, in standard deviations, a loss is a spike.
        spike_patience: consecutive steps that it must last.
        max_rollbacks: rollbacks over the whole run; the next spike stops it.
        replica_check_interval: steps between checksums of the weights that several ranks hold; they are also
            compared before each save. 0 switches it off.
        straggler_ratio: a rank is named that computes this many times as long as the others; 0 switches it
            off.
        first_step_timeout_s: the process dumps its stacks and exits when its first step, a validation pass or
            a save takes longer than this; 0 switches the watchdog off.
        step_timeout_s: the same for every later step; 0 switches the watchdog off.
    """

    __pydantic_config__ = STRICT

    steps: int
    global_batch_tokens: int
    micro_batch: int = 1
    engine: Literal["local", "deepspeed", "fsdp2"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    zero3_persistence_threshold: int = 100_000
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    offload_optimizer: bool = False
    forwards_first: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    z_loss: float = 0.0
    seed: int = 0
    init_from: str = ""
    validation_interval: int = 0
    validation_rows: int = 0
    threads: int = 0
    max_skipped_steps: int = 10
    spike_action: Literal["off", "warn", "rollback"] = "warn"
    spike_window: int = 50
    spike_deviations: float = 6.0
    spike_patience: int = 3
    max_rollbacks: int = 3
    replica_check_interval: int = 1000
    straggler_ratio: float = 1.55
    first_step_timeout_s: float = 1800.0
    step_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"training.steps = {self.steps}: use 1 or more steps")
        require(self.micro_batch >= 1, f"training.micro_batch = {self.micro_batch}: use 1 or more rows")
        require(
            self.forwards_first >= 1,
            f"training.forwards_first = {self.forwards_first}: use 1 or more micro-batches",
        )
        require(
            self.global_batch_tokens >= 1,
            f"training.global_batch_tokens = {self.global_batch_tokens}: must be positive",
        )
        require(
            math.isfinite(self.z_loss) and self.z_loss >= 0,
            f"training.z_loss = {self.z_loss}: use 0 (off) or a finite number",
        )
        for name in (
            "zero3_persistence_threshold",
            "validation_interval",
            "validation_rows",
            "threads",
            "max_skipped_steps",
            "max_rollbacks",
            "replica_check_interval",
        ):
            require(getattr(self, name) >= 0, f"training.{name} = {getattr(self, name)}: use 0 or more")
        require(self.spike_window >= 4, f"training.spike_window = {self.spike_window}: use 4 or more steps")
        require(
            self.spike_patience >= 1, f"training.spike_patience = {self.spike_patience}: use 1 or more steps"
        )
        require(
            math.isfinite(self.spike_deviations) and self.spike_deviations > 0,
            f"training.spike_deviations = {self.spike_deviations}: use a finite, positive number",
        )
        require(
            self.straggler_ratio == 0 or 1 < self.straggler_ratio < math.inf,
            f"training.straggler_ratio = {self.straggler_ratio}: use 0 (off) or a number above 1",
        )
        for name in ("first_step_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0, f"training.{name} = {value}: use 0 (off) or more seconds"
            )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Some steps under torch.profiler: a Chrome trace per rank in ``RUN/profile/`` (docs/console.md).

    Attributes:
        enabled: profile this run (`trellis train --profile`).
        start_step: the first step that is profiled; a start that resumes past it takes its own third step.
        steps: how many, up to 20: every operator of every micro-batch stays in memory until it is written.
            The one before them warms the profiler up.
        ranks: those that write a trace; () for all.
        shapes: record the shapes of operators' inputs.
        memory: record what operators allocate.
    """

    __pydantic_config__ = STRICT

    enabled: bool = False
    start_step: int = 10
    steps: int = 3
    ranks: tuple[int, ...] = ()
    shapes: bool = False
    memory: bool = False

    def __post_init__(self) -> None:
        require(
            self.start_step >= 2,
            f"logging.profile.start_step = {self.start_step}: use 2 or more, the step before it warms up",
        )
        require(1 <= self.steps <= 20, f"logging.profile.steps = {self.steps}: use 1 to 20")
        require(
            all(rank >= 0 for rank in self.ranks),
            f"logging.profile.ranks = {list(self.ranks)}: use ranks from 0, or [] for all",
        )


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while a run trains.

    Attributes:
        interval: steps between metric lines.
        tensorboard: also write TensorBoard events.
        progress: a progress bar on rank 0 when standard error is a terminal.
        profile: some steps under torch.profiler.
        probe_interval: steps between looks into the memories of the trellis layers and at the size of an
            update (docs/monitoring.md); 0 switches them off.
        peak_tflops: what one device can do per second in the run's precision, for the share that is used
            (perf/mfu); 0 takes it from a table of devices, and leaves the share out for others.
        wandb: project of Weights & Biases that the run is logged to as well ("": none); without a key the
            files stay in RUN/wandb for `wandb sync`. Needs the extra "wandb".
    """

    __pydantic_config__ = STRICT

    interval: int = 10
    tensorboard: bool = True
    progress: bool = True
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    probe_interval: int = 100
    peak_tflops: float = 0.0
    wandb: str = ""

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"logging.interval = {self.interval}: use 1 or more steps")
        require(
            self.probe_interval >= 0, f"logging.probe_interval = {self.probe_interval}: use 0 (off) or more"
        )
        require(
            math.isfinite(self.peak_tflops) and self.peak_tflops >= 0,
            f"logging.peak_tflops = {self.peak_tflops}: use 0 (from the table of devices) or a finite number",
        )
