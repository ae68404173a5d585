"""Estimated memory of one rank: state by the engine's arithmetic, activations by what autograd keeps."""

from __future__ import annotations

from dataclasses import dataclass

from launch.recipe import Recipe
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import ParameterCounts
from trellis_dist.parallel.config import MeshConfig

__all__ = ["estimate_memory"]

# Elements of width dim that one token leaves for the backward pass in one Trellis block: residual and two
# norms; q k v before and after convolution and normalisation, gate twice, output, post-norm, gated output.
_WHOLE_ACTIVATIONS, _SPLIT_ACTIVATIONS = 3, 14
_SEGMENT_TOKENS = 256  # from one memory that the compress operation keeps for backward to the next
# Elements of the largest block of logits (models/loss.py): on a CPU, where fp32 runs, and on a GPU.
_LOGIT_BLOCK = {"fp32": 1 << 21, "bf16": 1 << 28}


def estimate_memory(recipe: Recipe, *, counts: ParameterCounts, mesh: MeshConfig) -> dict[str, int]:
    """Bytes on one rank by part, and their "total" on the device.

    In host memory besides: what is offloaded ("host_state"), and on the rank that writes most the copies that
    a checkpoint is written from while training goes on ("host_snapshot").

    Args:
        mesh: of the run, with ``dp`` filled in.
    """
    # Norm weights are whole on every tp rank; they are too few to count.
    state = _State(recipe, -(-counts.total // mesh.tp), dp=mesh.dp or 1, sp=mesh.sp)
    offloaded = recipe.training.offload_optimizer
    parts = {
        "weights": state.weights(),
        "gathered_weights": state.gathered(counts, layers=recipe.model.num_layers, tp=mesh.tp),
        "gradients": state.gradients(),
        "master_weights": 0 if offloaded else state.masters(),
        "optimizer_moments": 0 if offloaded else state.moments(),
        "carried_states": _carried_states(recipe, mesh),
        "activations_estimate": _activations(recipe, mesh),
    }
    host = state.masters() + state.moments() if offloaded else 0
    if offloaded and recipe.training.engine == "fsdp2":  # whose shards are the masters, gradients beside them
        host += parts["weights"] + parts["gradients"]
        parts["weights"] = parts["gradients"] = 0
    snapshot = state.saved() if recipe.checkpoint.background else 0
    return {**parts, "total": sum(parts.values()), "host_state": host, "host_snapshot": snapshot}


@dataclass(frozen=True)
class _State:
    """Bytes of weights, gradients and optimizer state of ``parameters`` parameters on one rank."""

    recipe: Recipe
    parameters: int
    dp: int
    sp: int

    @property
    def _half(self) -> bool:
        return self.recipe.training.precision == "bf16"

    @property
    def _stage(self) -> int:
        """What is divided, in ZeRO's terms."""
        training = self.recipe.training
        return {"local": 0, "fsdp2": 3, "deepspeed": training.zero_stage}[training.engine]

    def _held(self, from_stage: int) -> int:
        """Parameters of which a rank holds what is divided from ``from_stage`` on."""
        ranks = self.dp if self.recipe.training.engine == "fsdp2" else self.dp * self.sp
        return -(-self.parameters // ranks) if self._stage >= from_stage else self.parameters

    def weights(self) -> int:
        wide = not self._half or self.recipe.training.engine == "fsdp2"
        return self._held(3) * (4 if wide else 2)

    def gathered(self, counts: ParameterCounts, *, layers: int, tp: int) -> int:
        """Whole weights in use where they are divided: embeddings, the block in work and the next."""
        if self._stage < 3:
            return 0
        whole = (counts.embedding + 2 * counts.non_embedding // layers) // tp
        return whole * (2 if self._half else 4)

    def gradients(self) -> int:
        """They are accumulated in fp32."""
        training = self.recipe.training
        # DeepSpeed's BF16_Optimizer, taken for these settings only, keeps the bf16 gradients beside the sums.
        twice = self._half and training.engine == "deepspeed" and self._stage == 1
        return self._held(2) * (6 if twice and not training.offload_optimizer else 4)

    def masters(self) -> int:
        """fp32 copies: of bf16 weights, of what ZeRO divides, and of what lies in host memory."""
        training = self.recipe.training
        apart = self._half or training.offload_optimizer or self._stage > 0
        return self._held(1) * 4 if apart and training.engine != "fsdp2" else 0

    def saved(self) -> int:
        """What rank 0 writes: weights, masters that hold more digits than those, moments."""
        apart = self._half and self.recipe.training.engine != "fsdp2"
        return self.weights() + (self._held(1) * 4 if apart else 0) + self.moments()

    def moments(self) -> int:
        return self._held(1) * (8 if self.recipe.optimizer.kind == "adamw" else 0)


def _carried_states(recipe: Recipe, mesh: MeshConfig) -> int:
    """What rows hand on between two steps, of every row of a replica and every layer.

    Both memories (fp32), the same at the start of the chunk that the row ends in, the convolution's inputs.
    """
    if recipe.data.carry_rows == 1:
        return 0
    model, width = recipe.model, 2 if recipe.training.precision == "bf16" else 4
    rows = recipe.global_rows // (mesh.dp or 1)
    memories = 2 * 2 * model.trellis.slots * model.dim * 4
    tail = max(model.trellis.conv_kernel - 1, 0) * 2 * model.dim * width
    return rows * model.num_layers * (memories + tail) // mesh.tp


def _activations(recipe: Recipe, mesh: MeshConfig) -> int:
    """What the micro-batches in work keep for their backward passes, and what the layer in work adds to it.

    Blocks and the loss; of every Trellis layer the memories at segment starts, of the one in work those at
    all chunk starts and their adjoints (docs/kernels.md). Full recomputation keeps a block's input only;
    selective recomputation keeps less than is said here.
    """
    model, training = recipe.model, recipe.training
    width = 2 if training.precision == "bf16" else 4
    tokens = training.micro_batch * recipe.data.sequence_length // mesh.sp
    block = _block_elements(recipe, mesh.tp)
    chunk, pair = model.trellis.chunk_size, 2 * model.trellis.slots * model.dim * 4 // mesh.tp
    trellis_layers = sum(model.layer_kind(layer) == "trellis" for layer in range(model.num_layers))
    memories = pair * -(-tokens // max(chunk, _SEGMENT_TOKENS))
    in_work = min(trellis_layers, 1) * 2 * pair * -(-tokens // chunk)
    if training.activation_checkpointing == "full":
        kept = tokens * model.num_layers * width * model.dim
        in_work += tokens * width * block + min(trellis_layers, 1) * memories
    else:
        kept = tokens * model.num_layers * width * block + trellis_layers * memories
    accumulation = recipe.global_rows // (training.micro_batch * (mesh.dp or 1))
    first = min(training.forwards_first, accumulation)
    return first * (kept + _loss_gradients(model, tokens, mesh.tp)) + in_work + _logits(recipe, tokens)


def _loss_gradients(model: ModelConfig, tokens: int, tp: int) -> int:
    """The loss keeps its two gradients (fp32)."""
    return (model.vocab_size // tp + tokens) * model.dim * 4


def _logits(recipe: Recipe, tokens: int) -> int:
    """One block of logits (fp32) with its softmax, while the loss runs."""
    return 2 * 4 * min(tokens * recipe.model.vocab_size, _LOGIT_BLOCK[recipe.training.precision])


def _block_elements(recipe: Recipe, tp: int) -> int:
    """Elements per token and block; Megatron's sequence parallelism splits the residual stream too."""
    model = recipe.model
    whole = _WHOLE_ACTIVATIONS * model.dim
    split = _SPLIT_ACTIVATIONS * model.dim + 2 * model.num_heads * model.trellis.slots + 4 * model.mlp_width
    return split // tp + (whole // tp if recipe.tensor.sequence_parallel else whole)
