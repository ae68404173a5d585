"""Memory of one rank, predicted: what the engine holds, what autograd keeps, the fullest moment of a step.

A step has four phases, and each its fullest moment (docs/planning.md has the equations):

    forward    what all blocks keep, and the loss
    backward   the last block's backward pass, or the end of the pass, when all gradients are there
    reduce     gradients and the buckets in which they travel
    update     gradients and the optimizer's temporaries

The prediction is the fullest of them, in bytes of live tensors. What an allocator loses is not in it (see
"resident" and launch.planning.meshes.FRAGMENTATION), nor the process: Python, libraries, CUDA's context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch.planning.activations import Block, block_of
from launch.recipe import Recipe
from trellis_dist.models.counts import ParameterCounts
from trellis_dist.parallel.config import MeshConfig

__all__ = ["NO_PARTS", "PHASES", "estimate_memory", "held_state", "phase_peaks"]

PHASES = ("forward", "backward", "reduce", "update")
# Of an estimate, what is no part of its total.
NO_PARTS = ("total", "resident", "host_state", "host_snapshot")

# Resident bytes of a CPU rank for a live one: its allocator (launch.ranks.MALLOC) keeps what is freed, in
# holes that later tensors do not all fill. Fitted to six cases, which are within a tenth (docs/planning.md).
_HOLES = 1.17
# Elements of the largest block of logits (models/loss.py), on a CPU and on a GPU.
_LOGIT_BLOCK = {False: 1 << 21, True: 1 << 28}
# Elements that one all-reduce of the local engine moves (parallel/gradients.py).
_LOCAL_BUCKET = 1 << 24
# DeepSpeed's defaults: elements that it gathers gradients up to, and weights that stay gathered at ZeRO 3.
_REDUCE_BUCKET = 500_000_000
_LIVE_WEIGHTS = 1_000_000_000
# gloo's threads hold the last buffers that they gathered: of all gathered weights, found at two sizes.
_GLOO_HOLDS = 1 / 3


def estimate_memory(
    recipe: Recipe, *, counts: ParameterCounts, mesh: MeshConfig, cuda: bool | None = None
) -> dict[str, int]:
    """Bytes on one rank by part at the fullest moment of a step, and their "total" on the device.

    "resident" (0 on a GPU): what the process of a CPU rank that `trellis train` starts comes to have resident
    above what it had after its imports, because its allocator keeps what is freed. In host memory besides:
    what is offloaded ("host_state"), and on the rank that writes most the copies that a checkpoint is written
    from while training goes on ("host_snapshot").

    Args:
        mesh: of the run, with ``dp`` filled in.
        cuda: whether ranks have a GPU each; None: as the recipe's precision says, bf16 being a GPU's.
    """
    step = _Step.of(recipe, counts, mesh, cuda)
    peaks = step.peaks()
    phase = max(PHASES, key=lambda name: sum(peaks[name].values()))
    parts = {**step.state.resident(), **dict.fromkeys(_PASSING, 0), **peaks[phase]}
    host = step.state.host()
    snapshot = step.state.saved() if recipe.checkpoint.background else 0
    total = sum(parts.values())
    # Copies of gradients are too large to be kept or to lie in what is: they come on top of it.
    copies = max(peaks["reduce"]["temporaries"], peaks["update"]["temporaries"])
    kept = 0 if step.state.cuda else int(total * _HOLES) + copies
    return {**parts, "total": total, "resident": kept, "host_state": host, "host_snapshot": snapshot}


# Parts that come and go within a step; the others are there all the time.
_PASSING = ("gradients", "activations", "loss", "temporaries")


def phase_peaks(
    recipe: Recipe, *, counts: ParameterCounts, mesh: MeshConfig, cuda: bool | None = None
) -> dict[str, int]:
    """Bytes on the device at the fullest moment of each of ``PHASES``; arguments as for `estimate_memory`."""
    step = _Step.of(recipe, counts, mesh, cuda)
    held = sum(step.state.resident().values())
    return {name: held + sum(parts.values()) for name, parts in step.peaks().items()}


def held_state(
    recipe: Recipe, *, counts: ParameterCounts, mesh: MeshConfig, cuda: bool | None = None
) -> dict[str, int]:
    """Bytes of weights, masters, moments, carried states, and of all gradients once they are there."""
    state = _Step.of(recipe, counts, mesh, cuda).state
    return {**state.resident(), "gradients": state.gradients()}


@dataclass(frozen=True)
class _State:
    """Bytes of weights, gradients and optimizer state on one rank."""

    recipe: Recipe
    counts: ParameterCounts
    mesh: MeshConfig
    cuda: bool

    @property
    def parameters(self) -> int:
        # Norm weights are whole on every tp rank; they are too few to count.
        return -(-self.counts.total // self.mesh.tp)

    @property
    def half(self) -> bool:
        return self.recipe.training.precision == "bf16" and self.cuda

    @property
    def stage(self) -> int:
        """What is divided, in ZeRO's terms."""
        training = self.recipe.training
        return {"local": 0, "fsdp2": 3, "deepspeed": training.zero_stage}[training.engine]

    @property
    def engine(self) -> str:
        return self.recipe.training.engine

    @property
    def ranks(self) -> int:
        """Among which the engine divides."""
        return (self.mesh.dp or 1) * (1 if self.engine == "fsdp2" else self.mesh.sp)

    def held(self, from_stage: int) -> int:
        """Parameters of which a rank holds what is divided from ``from_stage`` on."""
        return -(-self.parameters // self.ranks) if self.stage >= from_stage else self.parameters

    @property
    def _offloaded(self) -> bool:
        return self.recipe.training.offload_optimizer

    def resident(self) -> dict[str, int]:
        """What is on the device all the time."""
        shards = self.engine == "fsdp2" and self._offloaded  # whose shards are the masters, in host memory
        return {
            "weights": 0 if shards else self.weights(),
            "gathered_weights": self.gathered(),
            "master_weights": 0 if self._offloaded else self.masters(),
            "optimizer_moments": 0 if self._offloaded else self.moments(),
            "gradient_buffers": self.buffers(),
            "carried_states": _carried_states(self.recipe, self.mesh, self.half),
        }

    def host(self) -> int:
        """What is in host memory instead."""
        if not self._offloaded:
            return 0
        shards = self.weights() + self.gradients() if self.engine == "fsdp2" else 0
        return self.masters() + self.moments() + shards

    def weights(self) -> int:
        wide = not self.half or self.engine == "fsdp2"
        return self.held(3) * (4 if wide else 2)

    def gathered(self) -> int:
        """Whole weights where they are divided: at ZeRO 3 all up to ``_LIVE_WEIGHTS``, as prefetching and
        the distance of reuse keep them; with FSDP2 the root's, the block's in work and the next."""
        if self.stage < 3 or self.ranks == 1:
            return 0
        if self.engine == "deepspeed":
            whole = min(self.parameters, _LIVE_WEIGHTS)
            whole += 0 if self.cuda else int(_GLOO_HOLDS * whole)
        else:
            per_block = self.counts.non_embedding // self.recipe.model.num_layers
            whole = (self.counts.embedding + 2 * per_block) // self.mesh.tp
        return whole * (2 if self.half else 4)

    def gradients(self) -> int:
        """All of a step, accumulated in fp32."""
        return self.held(2) * (6 if self._twice else 4)

    @property
    def _twice(self) -> bool:
        """DeepSpeed's BF16_Optimizer, taken for these settings only, has sums beside the bf16 gradients."""
        return self.half and self.engine == "deepspeed" and self.stage == 1 and not self._offloaded

    def passing(self) -> int:
        """Of the gradients those that are not in buffers that stay."""
        if self.engine == "deepspeed" and self.stage == 3:
            return 0
        return self.held(2) * 2 if self._twice else self.gradients()

    @property
    def gradient_bytes(self) -> int:
        """Of one parameter while its block's backward pass runs."""
        return 2 if self.half and self.engine == "deepspeed" else 4

    def buffers(self) -> int:
        """ZeRO 3 keeps one bucket and the divided gradients for good, BF16_Optimizer the fp32 sums."""
        if self._twice:
            return self.held(2) * 4
        if self.engine != "deepspeed" or self.stage < 3:
            return 0
        return min(self.parameters, _REDUCE_BUCKET) * (2 if self.half else 4) + self.gradients()

    def masters(self) -> int:
        """fp32 copies: of bf16 weights, of what ZeRO divides, and of what lies in host memory."""
        apart = self.half or self._offloaded or self.stage > 0
        return self.held(1) * 4 if apart and self.engine != "fsdp2" else 0

    def saved(self) -> int:
        """What rank 0 writes: weights, masters that hold more digits than those, moments."""
        apart = self.half and self.engine != "fsdp2"
        return self.weights() + (self.held(1) * 4 if apart else 0) + self.moments()

    def moments(self) -> int:
        return self.held(1) * (8 if self.recipe.optimizer.kind == "adamw" else 0)


@dataclass(frozen=True)
class _Step:
    """One optimizer step on one rank."""

    recipe: Recipe
    state: _State
    blocks: tuple[Block, ...]
    tokens: int

    @classmethod
    def of(cls, recipe: Recipe, counts: ParameterCounts, mesh: MeshConfig, cuda: bool | None) -> _Step:
        training = recipe.training
        device = training.precision == "bf16" if cuda is None else cuda
        kinds = {recipe.model.layer_kind(i): i for i in range(recipe.model.num_layers)}
        made = {kind: block_of(recipe, mesh, layer=i, cuda=device) for kind, i in kinds.items()}
        blocks = tuple(made[recipe.model.layer_kind(i)] for i in range(recipe.model.num_layers))
        tokens = training.micro_batch * recipe.data.sequence_length // mesh.sp
        return cls(recipe, _State(recipe, counts, mesh, device), blocks, tokens)

    def peaks(self) -> dict[str, dict[str, int]]:
        """By phase, the parts that come and go."""
        return {
            "forward": self._forward(),
            "backward": max(self._backward(), key=lambda parts: sum(parts.values())),
            "reduce": {"gradients": self._all(), "temporaries": self._bucket()},
            "update": {"gradients": self._updating(), "temporaries": self._optimizer()},
        }

    @property
    def _width(self) -> int:
        return 2 if self.state.half else 4

    @property
    def _rows(self) -> int:
        """Bytes of [N, dim]."""
        return self.tokens * self.recipe.model.dim * self._width

    @property
    def _vocabulary(self) -> int:
        """Elements of the output weight on this rank."""
        return self.recipe.model.vocab_size * self.recipe.model.dim // self.state.mesh.tp

    @property
    def _accumulation(self) -> int:
        return self.recipe.global_rows // (self.recipe.training.micro_batch * (self.state.mesh.dp or 1))

    @property
    def _first(self) -> int:
        """Micro-batches under way together."""
        return min(self.recipe.training.forwards_first, self._accumulation)

    def _kept(self) -> int:
        return sum(block.stays(self.recipe.training.activation_checkpointing) for block in self.blocks)

    def _loss_kept(self) -> int:
        """The final norm's rows, and the loss's two gradients (that of the weight in fp32)."""
        return 2 * self._rows + 4 * self._vocabulary

    def _earlier(self) -> int:
        """Gradients of the micro-batches before."""
        return self.state.passing() if self._accumulation > self._first else 0

    def _all(self) -> int:
        """Gradients after the last backward pass: until they are reduced ZeRO 1 and 2 hold them whole, as far
        as a bucket of DeepSpeed's goes."""
        state = self.state
        if state.engine == "deepspeed" and state.stage == 2 and not self.recipe.training.offload_optimizer:
            whole = 4 if not state.half else 2
            return max(state.passing(), min(state.parameters, _REDUCE_BUCKET) * whole)
        return state.passing()

    def _forward(self) -> dict[str, int]:
        vocabulary, cuda = self.recipe.model.vocab_size // self.state.mesh.tp, self.state.cuda
        logits = 4 * min(self.tokens * vocabulary, max(_LOGIT_BLOCK[cuda], vocabulary))
        # logits and their log-softmax; the product that is added to the weight's gradient
        working = 2 * logits + 4 * self._vocabulary + self._rows
        return {
            "gradients": self._earlier(),
            "activations": self._first * self._kept(),
            "loss": self._first * self._loss_kept(),
            "temporaries": working,
        }

    def _backward(self) -> Iterator[dict[str, int]]:
        """At the last block, at the first, and at the end, where the embedding's gradient is made."""
        others, checkpointing = self._first - 1, self.recipe.training.activation_checkpointing
        block = max(b.backward(checkpointing) for b in self.blocks)
        table = (
            self._vocabulary * self._width
        )  # the output weight's gradient, which waits for the embedding's
        of_block = self.state.gradient_bytes * self.state.counts.non_embedding
        of_block //= self.state.mesh.tp * len(self.blocks)
        yield {
            "gradients": self._earlier() + table,
            "activations": self._first * self._kept(),
            "loss": others * self._loss_kept(),
            "temporaries": block + self._rows,
        }
        yield {
            "gradients": max(self._earlier() + table, self._all() - of_block),
            "activations": others * self._kept() + self.blocks[0].stays(checkpointing),
            "loss": others * self._loss_kept(),
            "temporaries": block + self._rows,
        }
        yield {
            "gradients": max(self._earlier(), self._all()),
            "activations": others * self._kept(),
            "loss": others * self._loss_kept(),
            "temporaries": 2 * table,
        }

    def _bucket(self) -> int:
        """Copies in which gradients travel."""
        state = self.state
        if state.engine == "local":
            shared = (state.mesh.dp or 1) * state.mesh.sp > 1
            return 4 * min(state.parameters, _LOCAL_BUCKET) if shared else 0
        if state.engine == "deepspeed" and state.stage < 3:
            return min(state.parameters, _REDUCE_BUCKET) * (2 if state.half and state.stage > 0 else 4)
        return 0

    def _updating(self) -> int:
        """Gradients while the optimizer runs: ZeRO has copied its part together and dropped the rest."""
        state = self.state
        zero = state.engine == "deepspeed" and state.stage > 0
        return 4 * state.held(1) if zero else state.passing()

    def _optimizer(self) -> int:
        """AdamW's root of the second moment: of all parameters at once on CUDA; on a CPU twice of the one
        parameter that is updated, and ZeRO's one parameter is its whole part."""
        state = self.state
        if self.recipe.optimizer.kind == "sgd":
            return 0
        if state.cuda:
            return 4 * state.held(1)
        zero = state.engine == "deepspeed" and state.stage > 0
        return 2 * 4 * (state.held(1) if zero else self._vocabulary)


def _carried_states(recipe: Recipe, mesh: MeshConfig, half: bool) -> int:
    """What rows hand on between two steps, of every row of a replica and every layer.

    Both memories (fp32), the same at the start of the chunk that the row ends in, the convolution's inputs.
    """
    if recipe.data.carry_rows == 1:
        return 0
    model, width = recipe.model, 2 if half else 4
    rows = recipe.global_rows // (mesh.dp or 1)
    memories = 2 * 2 * model.trellis.slots * model.dim * 4
    convolved = model.trellis.convolved_width(model.dim, model.num_heads)
    tail = max(model.trellis.conv_kernel - 1, 0) * convolved * width
    return rows * model.num_layers * (memories + tail) // mesh.tp
