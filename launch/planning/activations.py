"""Bytes that a block keeps for its backward pass and takes while that runs: what autograd holds, counted.

Symbols: N tokens of a micro-batch on a rank, F = model.dim, S = heads x slots, W = the SwiGLU's width,
H heads, D head width, M slots, C chunk size; under tensor parallelism all but the residual stream is divided.
docs/planning.md has the table, tests/launch/test_memory.py the comparison with a real step.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.mixer_bytes import mixer_bytes_of
from launch.recipe import Recipe
from trellis_dist.models.baseline_config import BASELINES
from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.parallel.config import MeshConfig

__all__ = ["Block", "block_of"]

_WIDE = 4  # bytes: gates, memories and what the operation computes with are fp32
_SEGMENT_TOKENS = (
    256  # from one memory that the Triton form keeps to the next (kernels.triton.stages.SEGMENT)
)


@dataclass(frozen=True)
class Block:
    """One block's bytes on one rank, for one micro-batch.

    Attributes:
        kept: without recomputation, tensors and joined weights, the operation's memories included.
        mlp: the part of ``kept`` that is free once the SwiGLU half has run its backward pass.
        output: the part that is free once the mixer's output stage has.
        boundary: what stays under full recomputation: the block's input.
        regions: what stays under selective recomputation.
        mlp_work, operation_work: most that the two halves' backward passes take beside what is kept and
            beside the gradients of weights.
        mlp_gradients: of the SwiGLU's weights, fp32.
    """

    kept: int
    mlp: int
    output: int
    boundary: int
    regions: int
    mlp_work: int
    operation_work: int
    mlp_gradients: int

    def stays(self, checkpointing: str) -> int:
        """Kept from the forward to the backward pass."""
        return {"none": self.kept, "selective": self.regions, "full": self.boundary}[checkpointing]

    def backward(self, checkpointing: str) -> int:
        """Most that the block's backward pass adds to what all blocks keep."""
        mlp, rest = self.mlp_work, self.mlp_gradients + self.operation_work
        if checkpointing == "full":  # the whole block is computed again first
            again = self.kept
            return max(again + mlp, again - self.mlp - self.output + rest)
        if checkpointing == "selective":  # one region at a time: the SwiGLU's is computed again, then dropped
            return max(self.mlp + mlp, self.output + rest)
        return max(mlp, rest - self.mlp - self.output)


def block_of(recipe: Recipe, mesh: MeshConfig, *, layer: int, cuda: bool) -> Block:
    """The block of layer ``layer``.

    Args:
        mesh: of the run, with ``dp`` filled in.
        cuda: bf16 and Triton where the recipe says so; a CPU computes in fp32 and piece by piece.
    """
    model, training = recipe.model, recipe.training
    width = 2 if training.precision == "bf16" and cuda else 4
    tokens = training.micro_batch * recipe.data.sequence_length // mesh.sp
    split = recipe.tensor.sequence_parallel
    sizes = _Sizes(model, tokens, tp=mesh.tp, sp=mesh.sp, cuda=cuda, stream_split=split)
    kind = model.layer_kind(layer)
    if kind in BASELINES:
        mixer = _baseline(recipe, mesh, sizes, kind, width)
    else:
        mixer = _counted(recipe, mesh, sizes, layer, width)
    mlp = sizes.tokens * width * (sizes.stream * (3 if cuda else 2) + 3 * sizes.hidden)
    mlp += 2 * sizes.hidden * model.dim * width  # its joined weights
    gradients = 3 * sizes.hidden * model.dim * _WIDE
    return Block(
        kept=mixer.kept + mlp,
        mlp=mlp,
        output=mixer.output,
        boundary=tokens * width * sizes.stream,
        regions=tokens * width * 3 * sizes.stream + mixer.regions,
        mlp_work=tokens * width * (4 * sizes.hidden + 2 * sizes.stream) + gradients,
        operation_work=mixer.work,
        mlp_gradients=gradients,
    )


@dataclass(frozen=True)
class _Mixer:
    """Bytes of a block's mixer half, its norm included; ``regions`` without rows of the residual stream."""

    kept: int
    output: int
    regions: int
    work: int


def _counted(recipe: Recipe, mesh: MeshConfig, sizes: _Sizes, layer: int, width: int) -> _Mixer:
    """A Trellis or attention mixer, by formula."""
    model, tokens = recipe.model, sizes.tokens
    trellis = model.layer_kind(layer) == "trellis"
    own = _trellis(sizes, model, layer) if trellis else _attention(sizes)
    operation = _Operation(recipe, mesh, sizes, cuda=sizes.cuda) if trellis else None
    held = operation.memories() + operation.moved() if operation else 0
    output = tokens * width * own["output"]
    kept = tokens * (width * (own["whole"] + own["split"]) + _WIDE * own["gates"])
    return _Mixer(
        kept=kept + output + own["joined"] * width + held,
        output=output,
        regions=tokens * (width * own["region"] + _WIDE * own["gates"]) + held,
        work=tokens * width * (sizes.stream + 2 * sizes.dim)
        + (operation.backward() if operation else tokens * width * 6 * sizes.dim)
        + sizes.dim * model.dim * _WIDE,
    )


def _baseline(recipe: Recipe, mesh: MeshConfig, sizes: _Sizes, kind: LayerKind, width: int) -> _Mixer:
    """A recurrent baseline's, counted while it runs; on CUDA the norm keeps its input too."""
    found = mixer_bytes_of(recipe, mesh, kind, half=width == 2)
    moved = found.operands if mesh.sp > 1 and recipe.sequence.mode == "all_to_all" else 0
    norm = sizes.tokens * width * sizes.stream * (2 if sizes.cuda else 1)
    # The output stage's part is free by then, unless it was just computed again.
    work = found.work + found.output
    return _Mixer(norm + found.kept + moved, found.output, found.regions + moved, work)


@dataclass(frozen=True)
class _Sizes:
    """Widths on this rank: ``stream`` of the residual stream, the others divided by tp."""

    model: ModelConfig
    tokens: int
    tp: int
    sp: int
    cuda: bool
    stream_split: bool

    @property
    def stream(self) -> int:
        return self.model.dim // (self.tp if self.stream_split else 1)

    @property
    def dim(self) -> int:
        return self.model.dim // self.tp

    @property
    def heads(self) -> int:
        return self.model.num_heads // self.tp

    @property
    def slots(self) -> int:
        return self.heads * self.model.trellis.slots

    @property
    def hidden(self) -> int:
        return self.model.mlp_width // self.tp


def _trellis(sizes: _Sizes, model: ModelConfig, layer: int) -> dict[str, int]:
    """Elements per token of a Trellis mixer, and those of its joined projection weights.

    whole: the norm's unit rows and its output (on CUDA its input too, which the fused norm keeps).
    split: the joined projections q k v z alpha gates; after the convolution 2F (on CUDA after SiLU 2F); unit
    q k 2F, v F, alpha S; with segments the convolution's inputs behind their halo, 2F.
    output: y's unit rows, normed, GELU of the gate, their product (CUDA: y too).
    """
    dim, slots, heads = sizes.dim, sizes.slots, sizes.heads
    gates = heads * (2 if model.gate(layer) == "learned" else 1)
    gates *= 2 if model.trellis.value_gates == "own" else 1
    joined = 4 * dim + (slots if model.trellis.targets == "own" else 0) + gates
    taps = model.trellis.conv_kernel
    read = model.trellis.convolved_width(dim, heads)
    convolved = read * ((taps > 0) + (taps > 1 and sizes.sp > 1) + sizes.cuda)
    operands = 3 * dim + slots
    return {
        "whole": (3 if sizes.cuda else 2) * sizes.stream,
        "split": joined + convolved + operands,
        "output": (5 if sizes.cuda else 4) * dim,
        "region": joined + operands + dim,
        "joined": joined * model.dim,
        # log beta, gamma, what their functions keep, and the inverse norms of q, k, v, alpha and y
        "gates": 3 * gates + 5 * heads,
    }


def _attention(sizes: _Sizes) -> dict[str, int]:
    """The same of an attention mixer: q k v before and after rotation, y."""
    dim = sizes.dim
    return {
        "whole": (3 if sizes.cuda else 2) * sizes.stream,
        "split": 3 * dim + 2 * dim,
        "output": dim,
        "region": 6 * dim,
        "joined": 3 * dim * sizes.model.dim,
        "gates": sizes.heads,
    }


@dataclass(frozen=True)
class _Operation:
    """The compress operation of one layer."""

    recipe: Recipe
    mesh: MeshConfig
    sizes: _Sizes
    cuda: bool

    @property
    def _passing(self) -> bool:
        return self.mesh.sp > 1 and self.recipe.sequence.mode == "state_passing"

    @property
    def _rows(self) -> tuple[int, int, int]:
        """Rows, tokens of a row and heads that the operation sees on this rank."""
        length = self.recipe.data.sequence_length
        shared = self.mesh.sp > 1 and not self._passing
        segment = length // self.mesh.sp if self._passing else length
        return self.recipe.training.micro_batch, segment, self.sizes.heads // (self.mesh.sp if shared else 1)

    @property
    def _pair(self) -> int:
        """Bytes of both memories of one head."""
        return 2 * self.recipe.model.trellis.slots * self.recipe.model.head_dim * _WIDE

    def memories(self) -> int:
        """What it keeps beside its operands: memories at the starts of pieces or, on CUDA, of segments."""
        rows, length, heads = self._rows
        chunk = self.recipe.model.trellis.chunk_size
        if self.cuda:
            every = max(1, _SEGMENT_TOKENS // chunk)
            chunks = -(-length // chunk)
            return -(-chunks // every) * rows * heads * self._pair
        if self._passing:
            return rows * heads * self._pair
        import torch

        from kernels.chunkwise import saved_count

        shape = (rows, length, heads)
        count = saved_count(shape, chunk, offset=0, device=torch.device("cpu"))
        return count * heads * self._pair

    def moved(self) -> int:
        """All-to-all keeps the operands twice: as this segment's, and as whole rows of some heads."""
        if self.mesh.sp == 1 or self._passing:
            return 0
        width = 2 if self.cuda and self.recipe.training.precision == "bf16" else 4
        sizes = self.sizes
        return sizes.tokens * (width * (3 * sizes.dim + sizes.slots) + _WIDE * 2 * sizes.heads)

    def backward(self) -> int:
        """Gradients of the operands, and what one piece (with state passing, the segment) holds at once."""
        sizes, options = self.sizes, self.recipe.model.trellis
        rows, length, heads = self._rows
        totals = sizes.tokens * (3 * sizes.dim + sizes.slots) * 4
        chunks = rows * -(-length // options.chunk_size)
        if self.cuda:  # memories at all chunk starts and their adjoints; Z, U and their gradients
            scratch = 2 * self._pair + 8 * options.chunk_size * options.slots * _WIDE
            return totals + chunks * heads * scratch
        matrices = chunks * heads
        if not self._passing:
            from kernels.chunkwise import MATRICES

            matrices = min(matrices, -(-MATRICES // heads) * heads)
        return totals + matrices * _chunk_bytes(self.recipe.model)


def _chunk_bytes(model: ModelConfig) -> int:
    """Most that ``kernels.stages`` holds of one chunk of one head in a backward pass (at input_backward).

    Inputs 3 CD + CM + CC; states 2 MD + 6 CM; dy CD; readout 3 CD + 2 CM + 2 MD; scan 2 MD + 6 CM; and the
    gradients of keys and values 3 CD + CM.
    """
    chunk, slots, width = model.trellis.chunk_size, model.trellis.slots, model.head_dim
    return _WIDE * (10 * chunk * width + 16 * chunk * slots + 6 * slots * width + chunk * chunk)
