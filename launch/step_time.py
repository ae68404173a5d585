"""How long an optimizer step takes, predicted: a roofline for layers, the wavefront for sp, rings for sums.

Everything here is a prediction, and says so where it is printed. docs/planning.md has the equations and where
each constant comes from; tests/launch/test_step_time.py holds them against runs of this project's records.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.activations import block_of
from launch.cluster_model import Cluster
from launch.recipe import Recipe
from trellis_dist.models.counts import ParameterCounts, flops_per_token, scan_flops_per_token
from trellis_dist.parallel.config import MeshConfig

__all__ = ["StepTime", "predict", "wavefront_seconds"]

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
        update=_update(recipe, cluster, mesh, counts),
    )


def wavefront_seconds(
    *, layers: int, layer: float, scans: float, sp: int, micro_batches: int, forwards_first: int, tied: bool
) -> float:
    """Seconds of a step's passes over ``sp`` segments (benchmarks/sequence_parallel/simulate.py runs it).

    Each rank runs one scan behind its left neighbour, and in the backward pass behind its right one; that
    is waited for once in a forward and once in a backward pass of the micro-batches that run together.

    Args:
        layer: seconds of one layer, forward and backward.
        scans: of them, those of scan and reverse scan.
        tied: a collective in every layer makes the ranks wait in every layer.
    """
    groups = -(-micro_batches // forwards_first)
    waits = micro_batches * layers if tied else groups
    return micro_batches * layers * layer + waits * (sp - 1) * scans


@dataclass(frozen=True)
class _Pace:
    """What one rank does in a step.

    Attributes:
        micro_batches: of the step on a rank.
        tokens: of a micro-batch on a rank.
        micro_batch: seconds of its passes, without waits and exchanges.
        scans: seconds of scan and reverse scan of one layer in it.
        width: bytes of an activation.
    """

    recipe: Recipe
    mesh: MeshConfig
    micro_batches: int
    tokens: int
    micro_batch: float
    scans: float
    width: int

    @classmethod
    def of(cls, recipe: Recipe, cluster: Cluster, mesh: MeshConfig) -> _Pace:
        model, training = recipe.model, recipe.training
        tokens = training.micro_batch * recipe.data.sequence_length // mesh.sp
        speed, again = cluster.flops_per_second, _AGAIN[training.activation_checkpointing]
        scan = tokens * scan_flops_per_token(model) / mesh.tp
        work = tokens * flops_per_token(model, sequence_length=recipe.data.sequence_length) / mesh.tp
        layers = sum(model.layer_kind(layer) == "trellis" for layer in range(model.num_layers))
        scans = scan * (1 + _REVERSE_SCAN) / (speed * _SCAN_SHARE[cluster.cuda])
        products = (work - 3 * layers * scan) * (1 + again / 3) / speed
        block = block_of(recipe, mesh, layer=0, cuda=cluster.cuda)
        traffic = model.num_layers * block.kept * (_PASSES + 2 * again) / (cluster.memory_gbps * 1e9)
        # On a CPU what a product leaves is in the cache for what comes after it; the efficiency was measured
        # over whole layers.
        seconds = products + layers * scans + (traffic if cluster.cuda else 0.0)
        if cluster.cuda:
            seconds = max(seconds, model.num_layers * _LAUNCH_SECONDS * (1 + again / 3))
        count = recipe.global_rows // (training.micro_batch * (mesh.dp or 1))
        width = 2 if cluster.cuda and training.precision == "bf16" else 4
        return cls(recipe, mesh, count, tokens, seconds, scans, width)

    def waiting(self) -> float:
        """For states; all-to-all sends none."""
        if self.mesh.sp == 1 or self.recipe.sequence.mode != "state_passing":
            return 0.0
        training = self.recipe.training
        tied = training.engine == "deepspeed" and training.zero_stage >= 2
        return wavefront_seconds(
            layers=self.recipe.model.num_layers,
            layer=0.0,
            scans=self.scans,
            sp=self.mesh.sp,
            micro_batches=self.micro_batches,
            forwards_first=min(training.forwards_first, self.micro_batches),
            tied=tied,
        )


def _ring(cluster: Cluster, size: float, *, ranks: int, span: int, trips: int) -> float:
    """A ring over ``ranks`` within ``span`` consecutive ones: one trip gathers or scatters, two reduce."""
    if ranks == 1:
        return 0.0
    latency, bandwidth = cluster.link(span)
    return trips * (ranks - 1) * (latency + size / ranks / bandwidth)


def _tensor(recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace) -> float:
    """Two sums of [N, F] forward and two backward in every layer; those of a recomputed pass run again."""
    size = pace.tokens * recipe.model.dim * pace.width
    sums = 4 + 2 * (recipe.training.activation_checkpointing != "none")
    one = _ring(cluster, size, ranks=mesh.tp, span=mesh.tp, trips=2)
    return pace.micro_batches * recipe.model.num_layers * sums * one


def _exchange(recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace) -> float:
    """All-to-all: q, k, v, alpha there and y back, and as much of gradients."""
    if mesh.sp == 1:
        return 0.0
    model = recipe.model
    all_layers = recipe.sequence.mode == "all_to_all"
    kinds = [model.layer_kind(layer) for layer in range(model.num_layers)]
    layers = len(kinds) if all_layers else kinds.count("attention")
    latency, bandwidth = cluster.link(mesh.sp * mesh.tp)
    numbers = 4 * model.dim + model.num_heads * model.trellis.slots
    size = pace.tokens * numbers // mesh.tp * pace.width
    return pace.micro_batches * layers * 2 * (2 * latency + size * (mesh.sp - 1) / mesh.sp / bandwidth)


def _reduction(
    recipe: Recipe, cluster: Cluster, mesh: MeshConfig, pace: _Pace, counts: ParameterCounts
) -> float:
    """As the engines do it: local and ZeRO 0 and 1 once a step, ZeRO 2 gradients after every micro-batch,
    ZeRO 3 and FSDP2 weights too; only FSDP2 on GPUs does so beside the passes."""
    training, dp = recipe.training, mesh.dp or 1
    parameters, span = counts.total / mesh.tp, dp * mesh.sp * mesh.tp
    gradients = 4.0 * parameters
    if training.engine == "fsdp2":
        weights = pace.width * parameters
        trips = pace.micro_batches * (
            2 * _ring(cluster, weights, ranks=dp, span=span, trips=1)
            + _ring(cluster, gradients, ranks=dp, span=span, trips=1)
        )
        hidden = pace.micro_batches * pace.micro_batch if cluster.cuda else 0.0
        shards = _ring(cluster, gradients / dp, ranks=mesh.sp, span=mesh.sp * mesh.tp, trips=2)
        return max(0.0, trips - hidden) + shards
    ranks = dp * mesh.sp
    if training.engine == "local" or training.zero_stage == 0:
        return _ring(cluster, gradients, ranks=ranks, span=span, trips=2)
    times = pace.micro_batches if training.zero_stage >= 2 else 1
    summed = times * _ring(cluster, gradients, ranks=ranks, span=span, trips=2)
    gathers = 1 if training.zero_stage < 3 else times
    return summed + gathers * _ring(cluster, pace.width * parameters, ranks=ranks, span=span, trips=1)


def _update(recipe: Recipe, cluster: Cluster, mesh: MeshConfig, counts: ParameterCounts) -> float:
    """Bound by memory."""
    training, dp = recipe.training, mesh.dp or 1
    divided = training.engine == "fsdp2" or (training.engine == "deepspeed" and training.zero_stage > 0)
    ranks = (dp if training.engine == "fsdp2" else dp * mesh.sp) if divided else 1
    return counts.total / mesh.tp / ranks * _UPDATE_BYTES / (cluster.memory_gbps * 1e9)
