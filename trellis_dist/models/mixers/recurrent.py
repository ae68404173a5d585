"""What the recurrent baselines share: the block of Trellis around another recurrence.

Shapes: B rows, T tokens, H heads, D = V head width, F = H D.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))       whatever else a kind projects
    out = W_o (rmsnorm_head(operation(q, k, v, ...)) * gelu(W_z x))

A kind is a subclass that names its projections, makes the operation's tokens of them and says what a head
keeps. Everything else is here: documents, states, decoding, and the attributes that parallel/ replaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import PackedLayout
from kernels.baselines.fla import on_gpu
from kernels.baselines.grid import Operation
from kernels.operator import full_precision
from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.conv import ConvFunction, causal_conv, last_inputs
from trellis_dist.models.init import Constant, Initial, Normal, new_parameter
from trellis_dist.models.linear import ColumnFunction, RowFunction, linear, linear_joined
from trellis_dist.models.norm import rms_normalise
from trellis_dist.models.parallel_kind import ParallelKind
from trellis_dist.models.region import Region, call

__all__ = ["Projection", "RecurrentMixer", "RecurrentState", "wide"]


@dataclass(frozen=True)
class RecurrentState:
    """What a layer carries between calls; its size does not depend on the position.

    Attributes:
        memory: what the heads keep, each [B, H, ...].
        tail: [B, K-1, W], the last inputs of the convolution; None without one.
        offset: tokens of the current mini-batch that are in the memory; 0 where there are no mini-batches.
    """

    memory: tuple[Tensor, ...]
    tail: Tensor | None
    offset: int = 0

    def select_rows(self, rows: Sequence[int]) -> RecurrentState:
        """The state whose row r continues row ``rows[r]`` of this one."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.memory[0].device)
        tail = None if self.tail is None else self.tail.index_select(0, index)
        return RecurrentState(tuple(x.index_select(0, index) for x in self.memory), tail, self.offset)

    @staticmethod
    def joined(states: Sequence[RecurrentState]) -> RecurrentState:
        """The rows of ``states`` one below the other; all must be as far into their mini-batch."""
        offsets = {state.offset for state in states}
        assert len(offsets) == 1, f"one state has one offset, these have {sorted(offsets)}"
        memory = tuple(torch.cat(parts) for parts in zip(*(state.memory for state in states), strict=True))
        tails = [state.tail for state in states if state.tail is not None]
        return RecurrentState(memory, torch.cat(tails) if tails else None, states[0].offset)

    def bytes(self) -> int:
        """Bytes of the state."""
        tensors = [*self.memory, *([] if self.tail is None else [self.tail])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Projection:
    """One of a mixer's input projections.

    Attributes:
        name: of what comes out; the weight is ``{name}_weight``.
        width: per head.
        convolved: whether the short convolution and its SiLU follow; the SiLU alone where the convolution has
            no taps, since it is the feature map of linear attention and GSA.
    """

    name: str
    width: int
    convolved: bool = False


# What the operation takes per token, what goes round it, and the output gate [B, T, F].
_Before = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


class RecurrentMixer(nn.Module):
    """A baseline's token mixer; abstract.

    Attributes:
        kind: the layer's name in ``model.pattern``.
        operation: the recurrence (`kernels.baselines.grid.Operation`); parallel/ replaces it to pass memories
            between ranks, or to see whole rows of some heads.
        convolution: called like ``conv.causal_conv``; parallel/ replaces it to fetch the halo.
        column, row: like ``linear.linear_joined`` and ``linear.linear``; parallel/ replaces them to split
            the heads. ``column`` may return more tokens than it was given.
        region: calls what comes before and after the operation; parallel/ replaces it to recompute that
            in the backward pass.
    """

    kind: ClassVar[LayerKind]
    norm_weight: nn.Parameter
    output_gate_weight: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int, operation: Operation) -> None:
        super().__init__()
        self.config, self.options, self.layer = config, config.baselines, layer
        self.operation = on_gpu(operation) if self.options.backend == "fla" else operation
        self.convolution: ConvFunction = causal_conv
        self.column: ColumnFunction = linear_joined
        self.row: RowFunction = linear
        self.region: Region = call
        taps = self.options.conv_kernel
        # Those that are convolved come first: the convolution runs over one block of features.
        self.projections = sorted(self.list_projections(config), key=lambda p: not (p.convolved and taps > 0))
        for projection in self.projections:
            self.add(f"{projection.name}_weight", config.num_heads * projection.width, config.dim)
        self._conv_names = [p.name for p in self.projections if p.convolved and taps > 0]
        for projection in self.projections[: len(self._conv_names)]:
            rows = config.num_heads * projection.width
            self.add(f"{projection.name}_conv_weight", rows, taps, initial=Normal(taps**-0.5))
        self.add("output_gate_weight", config.dim, config.dim)
        self.add("norm_weight", config.num_heads, config.head_dim, initial=Constant(1.0))
        out = new_parameter(
            config.dim, config.dim, initial=Normal(config.mixer_out_std), kind=ParallelKind.SHARDED, dim=1
        )
        self.out_weight = out

    # What a kind says of itself.

    @classmethod
    def list_projections(cls, config: ModelConfig) -> list[Projection]:
        """The input projections besides the output gate's; queries, keys and values by default."""
        width, values = config.head_dim, config.baselines.conv_values
        convolved = {"q": True, "k": True, "v": values}
        return [Projection(name, width, convolved=also) for name, also in convolved.items()]

    @classmethod
    def memory_shapes(cls, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor that one head of one document keeps; one matrix [D, V] by default."""
        return ((config.head_dim, config.head_dim),)

    @classmethod
    def operation_flops(cls, config: ModelConfig) -> float:
        """Forward FLOPs of the recurrence per token and head, in the chunkwise form (a multiply-add is 2)."""
        raise NotImplementedError

    @classmethod
    def own_norm_eps(cls, config: ModelConfig) -> float:
        """What the norm per head adds to the mean square, unless ``baselines.head_norm_eps`` says otherwise:
        ``model.norm_eps``, or as the original has it."""
        return config.norm_eps

    def make_tokens(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the operation takes per token, of the projections ``parts`` [B, T, H, width]."""
        raise NotImplementedError

    def head_weights(self) -> dict[str, Tensor]:
        """What the operation takes per head [H, ...]."""
        return {}

    def first_memory(self, documents: int) -> tuple[Tensor, ...]:
        """Memories [documents, H, ...] before the first token, one expanded; zeros unless learned."""
        heads = len(self.norm_weight)
        like, dtype = self.out_weight, _wide_dtype(self.out_weight)
        zeros = (like.new_zeros(1, heads, *shape, dtype=dtype) for shape in self.memory_shapes(self.config))
        return tuple(x.expand(documents, *x.shape[1:]) for x in zeros)

    def beside(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes round the operation to ``finish``, of the projections ``parts``."""
        return {}

    def finish(self, y: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """The operation's output y [B, T, H, V] with what its own token adds; y itself by default."""
        return y

    # What all kinds do.

    def add(self, name: str, *shape: int, initial: Initial | None = None) -> None:
        """A parameter whose first dimension is the heads'; N(0, init_std) unless told otherwise."""
        initial = Normal(self.config.init_std) if initial is None else initial
        parameter = new_parameter(*shape, initial=initial, kind=ParallelKind.SHARDED, dim=0)
        self.register_parameter(name, parameter)

    @property
    def chunk_size(self) -> int:
        """Tokens of a chunk of the operation's grid."""
        return self.config.chunk_size(self.kind)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; B = 1 when ``context`` holds several documents."""
        assert context.carried is None, "LanguageModel refuses a carry for these layers"
        tokens, beside, gate = self.region(self._before, x, context)
        layout = context.layout(self.chunk_size)
        if layout is None:
            batch, length = gate.shape[:2]
            layout = PackedLayout.uniform(batch, length, self.chunk_size).to(gate.device)
        memory = self.first_memory(layout.num_documents)
        y, _ = self._recur(tokens, memory, layout)
        return self.region(self._output, y, beside, gate)  # type: ignore[no-any-return]

    def init_state(self, batch: int) -> RecurrentState:
        """The state before the first token of ``batch`` rows."""
        memory = tuple(x.detach().clone() for x in self.first_memory(batch))
        reach = self.options.conv_kernel - 1
        width = sum(len(getattr(self, f"{name}_weight")) for name in self._conv_names)
        tail = self.out_weight.new_zeros(batch, reach, width) if width > 0 else None
        return RecurrentState(memory, tail)

    def prefill(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Continue ``state`` over x [B, T, dim]; returns ([B, T, dim], the state after it)."""
        projected = self._project(x)
        tokens, beside, gate = self._split(projected, tail=state.tail)
        batch, length = x.shape[:2]
        chunk, mini_batches = self.chunk_size, self.config.has_mini_batches(self.kind)
        if not mini_batches:  # any chunk gives the same function, and slots without tokens cost time
            chunk = min(chunk, length)
        layout = PackedLayout.uniform(batch, length, chunk, offset=state.offset).to(x.device)
        y, memory = self._recur(tokens, state.memory, layout)
        tail = None if state.tail is None else last_inputs(state.tail, self._convolved(projected))
        offset = layout.end_offsets[0] if mini_batches else 0
        return self._output(y, beside, gate), RecurrentState(memory, tail, offset)

    def decode_step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """One token: x [B, dim] -> ([B, dim], the state after it)."""
        out, state = self.prefill(x.unsqueeze(1), state)
        return out.squeeze(1), state

    def _recur(
        self, tokens: dict[str, Tensor], memory: tuple[Tensor, ...], layout: PackedLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with full_precision(self.out_weight):
            return self.operation(tokens, self.head_weights(), memory, layout)

    def _before(self, x: Tensor, context: SequenceContext) -> _Before:
        return self._split(self._project(x), edges=context.edges)

    def _project(self, x: Tensor) -> Tensor:
        """Every input projection in one matmul [B, T, sum of widths], the output gate's last."""
        weights = [getattr(self, f"{p.name}_weight") for p in self.projections]
        return self.column(x, [*weights, self.output_gate_weight])

    def _convolved(self, projected: Tensor) -> Tensor:
        """The part [B, T, W] that the convolution reads."""
        return projected[..., : sum(len(getattr(self, f"{name}_weight")) for name in self._conv_names)]

    def _split(
        self, projected: Tensor, *, edges: tuple[Tensor, ...] | None = None, tail: Tensor | None = None
    ) -> _Before:
        mixed = self._convolved(projected)
        if self._conv_names:
            weight = torch.cat([getattr(self, f"{name}_conv_weight") for name in self._conv_names])
            mixed = F.silu(self.convolution(mixed, weight, edges=edges, tail=tail))
        rest, gate = projected[..., mixed.shape[-1] :].split(
            [
                projected.shape[-1] - mixed.shape[-1] - len(self.output_gate_weight),
                len(self.output_gate_weight),
            ],
            dim=-1,
        )
        sizes = [len(getattr(self, f"{p.name}_weight")) for p in self.projections]
        first = len(self._conv_names)
        pieces = [*mixed.split(sizes[:first], dim=-1)] if first else []
        pieces += rest.split(sizes[first:], dim=-1)
        named = zip(self.projections, pieces, strict=True)
        parts = {p.name: self._activated(p, piece).unflatten(-1, (-1, p.width)) for p, piece in named}
        return self.make_tokens(parts), self.beside(parts), gate

    def _activated(self, projection: Projection, piece: Tensor) -> Tensor:
        """A projection's output, with the SiLU that a convolution of no taps leaves."""
        alone = projection.convolved and self.options.conv_kernel == 0
        return F.silu(piece) if alone else piece

    def _output(self, y: Tensor, beside: Mapping[str, Tensor], gate: Tensor) -> Tensor:
        """Per-head RMSNorm, GELU gate and output projection: y [B, T, H, V] -> [B, T, dim]."""
        y = self.finish(y, beside)
        eps = self.options.head_norm_eps or self.own_norm_eps(self.config)
        normed = rms_normalise(y, eps=eps, weight=self.norm_weight)
        return self.row(normed.flatten(-2) * F.gelu(gate), self.out_weight)

    # For counts.py.

    @classmethod
    def flops_per_token(cls, config: ModelConfig) -> float:
        """Forward FLOPs of the mixer per token."""
        projections = cls.list_projections(config)
        widths = sum(p.width for p in projections)
        convolved = sum(p.width for p in projections if p.convolved)
        products = 2 * config.dim**2 + config.dim * config.num_heads * widths
        convolution = config.num_heads * convolved * config.baselines.conv_kernel
        return 2.0 * (products + convolution) + config.num_heads * cls.operation_flops(config)

    @classmethod
    def state_bytes(cls, config: ModelConfig, element_bytes: int) -> int:
        """Decode-state bytes of one sequence; `RecurrentState.bytes` of one row."""
        shapes = cls.memory_shapes(config)
        memory = sum(torch.Size(shape).numel() for shape in shapes) * max(4, element_bytes)
        convolved = sum(p.width for p in cls.list_projections(config) if p.convolved)
        tail = max(config.baselines.conv_kernel - 1, 0) * convolved * element_bytes
        return config.num_heads * (memory + tail)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or fp64 when it is fp64: gates and memories never live in half precision."""
    return x.to(_wide_dtype(x))
