"""How long an optimizer step takes, predicted: a roofline for layers, the wavefront for sp, rings for sums.

Everything here is a prediction, and says so where it is printed. docs/planning.md has the equations and where
each constant comes from; tests/launch/test_cluster_plan.py holds them against runs of this project's records.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from launch.planning.activations import block_of
from launch.planning.cluster import Cluster
from launch.planning.mixer_bytes import mixer_bytes_of
from launch.recipe import Recipe
from trellis_dist.models.baseline_config import BASELINES
from trellis_dist.models.config import ATTENTION_KINDS, LayerKind, ModelConfig
from trellis_dist.models.counts import (
    ParameterCounts,
    flops_per_token,
    memory_elements,
    operation_flops_per_token,
    scan_flops_per_token,
)
from trellis_dist.parallel.config import MeshConfig

__all__ = ["StepTime", "predict", "ties", "wavefront_seconds"]

# A scan is a chain of small products, one chunk after the other: the share of the matrix products' speed that
# it reaches. On a CPU core measured (benchmarks/results/sequence_parallel.json, "stages"); assumed on a GPU.
_SCAN_SHARE = {False: 0.45, True: 0.15}
# Reverse over forward scan, and recomputed forward passes over forward passes.
_REVERSE_SCAN = 1.5
# How often a kept activation passes through memory: written, read, and in the backward pass read and its
# gradient written and read again.
_PASSES = 5
# A GPU runs a layer's kernels, forward and backward, no faster than Python starts them: about 250 of them at
# 6 microseconds each. Assumed.
_LAUNCH_SECONDS = 1.5e-3
# Bytes of optimizer state, gradient and weight that AdamW reads or writes for a parameter.
_UPDATE_BYTES = 32
# Of the work of a whole step: what selective and full recomputation do again.
_AGAIN = {"none": 0.0, "selective": 0.85, "full": 1.0}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank, by part.

    Attributes:
        layers: all micro-batches' passes over blocks and loss, recomputation included.
        waiting: for the states of neighbouring segments.
        tensor: all-reduces inside tp groups.
        exchange: all-to-all inside sp groups.
        reduction: gradients, and weights where the engine divides them, over dp x sp.
        update: the optimizer.
    """

    layers: float
    waiting: float
    tensor: float
    exchange: float
    reduction: float
    update: float

    @property
    def total(self) -> float:
        """Of the step; the parts do not overlap where this project's engines do not overlap them."""
        return self.layers + self.waiting + self.tensor + self.exchange + self.reduction + self.update


def predict(recipe: Recipe, cluster: Cluster, *, counts: ParameterCounts, mesh: MeshConfig) -> StepTime:
    """The step of ``recipe`` on ``mesh`` (``dp`` filled in), one rank on each device of ``cluster``."""
    pace = _Pace.of(recipe, cluster, mesh)
    passes = pace.micro_batches * pace.micro_batch
    return StepTime(
        layers=passes,
        waiting=pace.waiting(),
        tensor=_tensor(recipe, cluster, mesh, pace),
        exchange=_exchange(recipe, cluster, mesh, pace),
        reduction=_reduction(recipe, cluster, mesh, pace, counts),
        update=_update(recipe, cluster, mesh, pace, counts),
    )


def wavefront_seconds(
    *,
    layers: int,
    layer: float,
    scans: float,
    sp: int,
    micro_batches: int,
    forwards_first: int,
    ties: int = 0,
) -> float:
    """Seconds of a step's passes over ``sp`` segments (benchmarks/sequence_parallel/simulate.py runs it).

    Each rank runs one scan behind its left neighbour, and in the backward pass behind its right one; that
    is waited for once in a forward and once in a backward pass of the micro-batches that run together, or
    again from every point on at which a collective makes the ranks wait for the last.

    Args:
        layer: seconds of one layer, forward and backward.
        scans: of them, those of scan and reverse scan, and of handing the states on.
        ties: points of a micro-batch after which the segments begin at the same time again.
    """
    waits = micro_batches * ties if ties else -(-micro_batches // forwards_first)
    return micro_batches * layers * layer + waits * (sp - 1) * scans


def ties(recipe: Recipe, mesh: MeshConfig) -> int:
    """How often in a micro-batch a collective makes segments that pass states wait for each other.

    ZeRO 2 and 3 reduce or gather over dp x sp in every layer; the all-to-all of an attention layer makes
    the ranks wait once for every run of recurrent layers between two of them. 0: nothing does.
    """
    if mesh.sp == 1 or recipe.sequence.mode != "state_passing":
        return 0
    recurrent = [kind not in ATTENTION_KINDS for kind in _kinds(recipe)]
    if recipe.training.engine == "deepspeed" and recipe.training.zero_stage >= 2:
        return sum(recurrent)
    return 0 if all(recurrent) else sum(passes for passes, _ in groupby(recurrent))


def _kinds(recipe: Recipe) -> list[LayerKind]:
    model = recipe.model
    return [model.layer_kind(layer) for layer in range(model.num_layers)]


def _scan(model: ModelConfig, kind: LayerKind) -> tuple[float, float]:
    """Of one layer: forward FLOPs per token of what a neighbour waits for, and backward over forward of it.

    Trellis hands its memories on after the scan; the baselines after their whole operation
    (parallel/recurrent.py), whose gradient is twice the work.
    """
    if kind == "trellis":
        return scan_flops_per_token(model), _REVERSE_SCAN
    return (0.0, 0.0) if kind in ATTENTION_KINDS else (operation_flops_per_token(model, kind), 2.0)


@dataclass(frozen=True)
class _Pace:
    """What one rank does in a step.

    Attributes:
        micro_batches: of the step on a rank.
        tokens: of a micro-batch on a rank.
        micro_batch: seconds of its passes, without waits and exchanges.
        scans: seconds of scan and reverse scan in it, of the layer that takes longest: the wavefront's lag.
        handing: seconds that the layer's states and their gradients take to the neighbours.
        width: bytes of an activation.
    """

    recipe: Recipe
    mesh: MeshConfig
    micro_batches: int
    tokens: int
    micro_batch: float
    scans: float
    handing: float
    width: int

    @classmethod
    def of(cls, recipe: Recipe, cluster: Cluster, mesh: MeshConfig) -> _Pace:
        model, training = recipe.model, recipe.training
        tokens = training.micro_batch * recipe.data.sequence_length // mesh.sp
        speed = cluster.flops_per_second(training.precision)
        again = _AGAIN[training.activation_checkpointing]
        work = tokens * flops_per_token(model, sequence_length=recipe.data.sequence_length) / mesh.tp
        parts = [_scan(model, kind) for kind in _kinds(recipe)]
        share = tokens / mesh.tp / (speed * _SCAN_SHARE[cluster.cuda])
        each = [scan * (1 + reverse) * share for scan, reverse in parts]
        inside = 3 * tokens / mesh.tp * sum(scan for scan, _ in parts)
        products = (work - inside) * (1 + again / 3) / speed
        kept = _kept(recipe, mesh, cuda=cluster.cuda)
        traffic = kept * (_PASSES + 2 * again) / (cluster.memory_gbps * 1e9)
        # On a CPU what a product leaves is in the cache for what comes after it; the efficiency was measured
        # over whole layers.
        seconds = products + sum(each) + (traffic if cluster.cuda else 0.0)
        if cluster.cuda:
            seconds = max(seconds, model.num_layers * _LAUNCH_SECONDS * (1 + again / 3))
        count = recipe.global_rows // (training.micro_batch * (mesh.dp or 1))
        width = 2 if cluster.cuda and training.precision == "bf16" else 4
        handing = _handing(recipe, cluster, mesh)
        return cls(recipe, mesh, count, tokens, seconds, max(each), handing, width)

    def waiting(self) -> float:
        """For states; all-to-all sends none."""
        if self.mesh.sp == 1 or self.recipe.sequence.mode != "state_passing":
            return 0.0
        training = self.recipe.training
        return wavefront_seconds(
            layers=self.recipe.model.num_layers,
            layer=0.0,
            scans=self.scans + self.handing,
            sp=self.mesh.sp,
            micro_batches=self.micro_batches,
            forwards_first=min(training.forwards_first, self.micro_batches),
            ties=ties(self.recipe, self.mesh),
        )


def _kept(recipe: Recipe, mesh: MeshConfig, *, cuda: bool) -> int:
    """Bytes that all blocks keep."""
    kinds = _kinds(recipe)
    kept = {kind: block_of(recipe, mesh, layer=kinds.index(kind), cuda=cuda).kept for kind in set(kinds)}
    return sum(kept[kind] for kind in kinds)


def _handing(recipe: Recipe, cluster: Cluster, mesh: MeshConfig) -> float:
    """Every row's memories, fp32, to the right neighbour, and their gradients to the left one."""
    largest = max(memory_elements(recipe.model, kind) for kind in recipe.model.pattern)
    size = recipe.training.micro_batch * largest * 4 / mesh.tp
    latency, bandwidth = _link(cluster, mesh, mesh.sp * mesh.tp)
    return 2 * (latency + size / bandwidth)


def _link(cluster: Cluster, mesh: MeshConfig, size: int) -> tuple[float, float]:
    """Of groups of ``size`` consecutive ranks of the mesh."""
    return cluster.link(size, ranks=mesh.world_size() or size)


def _ring(link: tuple[float, float], size: float, *, ranks: int, trips: int) -> float:
    """A ring over ``ranks``: one trip gathers or scatters, two reduce."""
    if ranks == 1:
        return 0.0
    latency, bandwidth = link
    return trips * (ranks - 1) * (latency + size / ranks / bandwidth)


def _tensor(recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace) -> float:
    """Two sums of [N, F] forward and two backward in every layer; those of a recomputed pass run again."""
    size = pace.tokens * recipe.model.dim * pace.width
    sums = 4 + 2 * (recipe.training.activation_checkpointing != "none")
    one = _ring(_link(cluster, mesh, mesh.tp), size, ranks=mesh.tp, trips=2)
    return pace.micro_batches * recipe.model.num_layers * sums * one


def _exchange(recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace) -> float:
    """All-to-all: the operation's tokens (q, k, v and what a kind adds) there and y back, and gradients."""
    if mesh.sp == 1:
        return 0.0
    latency, bandwidth = _link(cluster, mesh, mesh.sp * mesh.tp)
    seconds = 0.0
    for kind in _kinds(recipe):
        if kind in ATTENTION_KINDS or recipe.sequence.mode == "all_to_all":
            size = _operands(recipe, mesh, pace, kind)
            seconds += 2 * (2 * latency + size * (mesh.sp - 1) / mesh.sp / bandwidth)
    return pace.micro_batches * seconds


def _operands(recipe: Recipe, mesh: MeshConfig, pace: _Pace, kind: LayerKind) -> float:
    """Bytes of a micro-batch that go into the operation of a layer of ``kind``, and come out of it."""
    model = recipe.model
    if kind in BASELINES:
        return mixer_bytes_of(recipe, mesh, kind, half=pace.width == 2).operands
    alpha = model.num_heads * model.trellis.slots if kind == "trellis" else 0
    return pace.tokens * (4 * model.dim + alpha) / mesh.tp * pace.width


def _reduction(
    recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace, counts: ParameterCounts
) -> float:
    """As the engines do it: local and ZeRO 0 and 1 once a step, ZeRO 2 gradients after every micro-batch,
    ZeRO 3 and FSDP2 weights too; only FSDP2 on GPUs does so beside the passes."""
    training, dp = recipe.training, mesh.dp or 1
    parameters, whole = counts.total / mesh.tp, _link(cluster, mesh, mesh.world_size() or 1)
    if training.engine == "fsdp2":
        return _fsdp_reduction(cluster, mesh, pace, parameters)
    ranks = dp * mesh.sp
    if training.engine == "local" or training.zero_stage == 0:
        return _ring(whole, 4 * parameters, ranks=ranks, trips=2)
    # DeepSpeed sends gradients in the weights' precision. Stages 1 and 2 sum them on every rank; stage 3
    # scatters sums, but not with sp (training/engines/deepspeed.py: it would divide by sp too).
    stage = training.zero_stage
    trips = 1 if stage == 3 and mesh.sp == 1 else 2
    times = pace.micro_batches if stage >= 2 else 1
    summed = times * _ring(whole, pace.width * parameters, ranks=ranks, trips=trips)
    gathers = 1 if stage < 3 else times
    return summed + gathers * _ring(whole, pace.width * parameters, ranks=ranks, trips=1)


def _fsdp_reduction(cluster: Cluster, mesh: MeshConfig, pace: _Pace, parameters: float) -> float:
    """Over dp in every micro-batch weights twice and fp32 gradients once; once a step their sum over sp."""
    dp, whole = mesh.dp or 1, _link(cluster, mesh, mesh.world_size() or 1)
    weights = 2 * _ring(whole, pace.width * parameters, ranks=dp, trips=1)
    scattered = pace.micro_batches * (weights + _ring(whole, 4 * parameters, ranks=dp, trips=1))
    hidden = pace.micro_batches * pace.micro_batch if cluster.cuda else 0.0
    inner = _link(cluster, mesh, mesh.sp * mesh.tp)
    return max(0.0, scattered - hidden) + _ring(inner, 4 * parameters / dp, ranks=mesh.sp, trips=2)


def _update(
    recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace, counts: ParameterCounts
) -> float:
    """Bound by memory: the device's, or the host's, where gradients go and weights come from as well."""
    training, dp = recipe.training, mesh.dp or 1
    divided = training.engine == "fsdp2" or (training.engine == "deepspeed" and training.zero_stage > 0)
    ranks = (dp if training.engine == "fsdp2" else dp * mesh.sp) if divided else 1
    held = counts.total / mesh.tp / ranks
    if training.offload_optimizer and cluster.cuda:
        return held * (_UPDATE_BYTES + 4 + pace.width) / (cluster.host_gbps * 1e9)
    return held * _UPDATE_BYTES / (cluster.memory_gbps * 1e9)
