"""The stages of ``kernels.stages`` as Triton launches, with the memory plan of a call.

    arrange            gates in chunk order; operands stay in token order
    scan_forward       memories over whole documents: chunk starts (scratch), segment starts (to keep)
    rescan             chunk starts again, all segments at once
    readout_forward    outputs
    readout_backward   the output's gradients inside each chunk
    scan_backward      adjoints of the memories
    input_backward     gradients of every operand

A composition across devices puts the transfer of the initial memories before scan_forward and that of their
adjoints before scan_backward; names, arguments and results are those of ``kernels.stages``, and what passes
between stages is its own affair. Cut at a multiple of C, no bit of memories, outputs or gradients differs.
Kernels run on the current device, which has to be the operands'.

Shapes: q, k [B, T, H, D]; v [B, T, H, V]; alpha [B, T, H, M]; P chunks, N documents by rank, G segments of
SEGMENT tokens or one chunk; memories [., H, M, .]. Scratch for both passes is stacked, [2, P, H, C, M]. It is
fp32, and bf16 where products round their factors to bf16 anyway (``tiles``); segment starts, adjoints handed
on and row sums are fp32 always. Every entry is written before it is read, and no sum depends on a race, so
runs repeat bitwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activations import ELEMENTWISE_PHI
from kernels.layout import PackedLayout
from kernels.triton import inputs as inputs_room
from kernels.triton import launch, readout, scan
from kernels.triton.gates import Gates, derive_gates, gate_gradients
from kernels.triton.tiles import Pass, Sizes, Tables
from kernels.triton.triangular import diagonal_inverses
from kernels.types import Memories, Operands, Rule

__all__ = ["SEGMENT", "Inputs", "ReadoutGradients", "ScanGradients", "States", "arrange", "from_tokens"]
__all__ += [
    "input_backward",
    "readout_backward",
    "readout_forward",
    "rescan",
    "scan_backward",
    "scan_forward",
]
__all__ += ["segment_chunks", "to_tokens"]

SEGMENT = 256  # tokens from one memory that backward keeps to the next

_Pair = tuple[Tensor | None, Tensor | None]


def segment_chunks(chunk_size: int) -> int:
    """Chunks of a segment."""
    return max(1, SEGMENT // chunk_size)


@dataclass(frozen=True)
class Inputs:
    """What every stage of one call reads.

    Attributes:
        operands: token order, contiguous.
        gates: chunk order.
        layout: the chunk grid, on the operands' device.
        rule: which function is computed.
    """

    operands: Operands
    gates: Gates
    layout: PackedLayout
    rule: Rule

    @property
    def heads(self) -> int:
        """H."""
        return self.operands.q.shape[2]

    @property
    def slots(self) -> int:
        """M."""
        return self.operands.alpha.shape[3]

    @property
    def written(self) -> tuple[Tensor, Tensor]:
        """What the two passes write: keys and values."""
        return self.operands.k, self.operands.v

    @functools.cached_property
    def precision(self) -> str:
        """Of products (``tiles``)."""
        types = {x.dtype for x in self.operands[:3]}
        if types == {torch.bfloat16}:
            return "bf16"
        return "tf32" if types <= {torch.bfloat16, torch.float16} else "ieee"

    @functools.cached_property
    def size(self) -> launch.Size:
        """What launch parameters are found by."""
        q, v, rule = self.operands.q, self.operands.v, self.rule
        return launch.Size(
            arch=launch.architecture(q.device),
            d=q.shape[3],
            v=v.shape[3],
            m=self.slots,
            c=self.layout.chunk_size,
            corrected=rule.corrected,
            itemsize=self._factor.itemsize,
            mixing=rule.phi not in ELEMENTWISE_PHI,
        )

    @functools.cached_property
    def inverse(self) -> Tensor:
        """Inverses of the corrected update's diagonal tiles [2, P, H, tiles, BT, BT]."""
        tokens = self.launch("scan_forward").tokens
        return diagonal_inverses(
            self.written, self.gates.log_decay, self.gates.step, self.layout, tokens=tokens
        )

    def launch(self, kernel: str) -> launch.Launch:
        """Launch parameters of a kernel."""
        return launch.parameters(kernel, self.size)

    def options(self, kernel: str) -> dict[str, Any]:
        """Keyword arguments of a launch, not to be changed."""
        even = self.layout.num_chunks == self.layout.num_documents * len(self.layout.steps)
        return _options(self.launch(kernel), self.size, self.rule, even, self.precision)

    def tables(self, chunks: int) -> Tables:
        """The layout as the kernels read it, with scans over runs of ``chunks`` chunks."""
        layout, runs = self.layout, self.layout.segments(chunks)
        base, counts = layout.rank_chunks
        return Tables(
            runs.rank, runs.first_step, runs.count, base, counts, *layout.chunk_tokens, layout.ends_inside
        )

    @functools.cached_property
    def whole(self) -> Tables:
        """``tables`` with every document one run."""
        return self.tables(len(self.layout.steps))

    def scratch(self, width: int | None = None) -> Tensor:
        """[2, P, H, C, M] for factors of products, or with ``width`` fp32 [width, P, H, C]."""
        shape = (self.layout.num_chunks, self.heads, self.layout.chunk_size)
        if width is not None:
            return self.operands.q.new_empty(width, *shape, dtype=torch.float32)
        return self.operands.q.new_empty(2, *shape, self.slots, dtype=self._factor)

    def memories(self, count: int, *, factor: bool = False) -> Memories:
        """[count, H, M, .], fp32 or for factors of products."""
        q, v, shape = self.operands.q, self.operands.v, (count, self.heads, self.slots)
        dtype = self._factor if factor else torch.float32
        return Memories(*(x.new_empty(*shape, x.shape[3], dtype=dtype) for x in (q, v)))

    @property
    def _factor(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@functools.lru_cache(maxsize=1024)
def _options(
    found: launch.Launch, size: launch.Size, rule: Rule, even: bool, precision: str
) -> dict[str, Any]:
    sizes = Sizes(
        D=size.d,
        V=size.v,
        M=size.m,
        C=size.c,
        BD=launch.padded(size.d),
        BV=launch.padded(size.v),
        BM=found.slots,
        BT=found.tokens,
        TILES=triton.cdiv(size.c, found.tokens),
        phi=tl.constexpr(rule.phi),
        readout=tl.constexpr(rule.readout),
        corrected=rule.corrected,
        even=even,
        precision=tl.constexpr(precision),
    )
    return {"Z": sizes, "num_warps": found.warps, "num_stages": found.stages}


@dataclass(frozen=True)
class States:
    """A forward scan.

    Attributes:
        start: memories before each chunk [P, ...].
        pair: the stale pair of the documents' first chunks [N, ...]; None takes ``start``.
        gradient: inner gradients [2, P, H, C, M]; None where they are recomputed.
        saved: memories at segment starts [G, ...], what backward keeps; None in a rescan.
        last: chunk-start pair that the next call takes, by rank [N, ...]; None in a rescan.
    """

    start: Memories
    pair: Memories | None
    gradient: Tensor | None
    saved: Memories | None
    last: Memories | None

    def passes(self, inputs: Inputs) -> tuple[Pass, Pass]:
        """Both passes as the parallel kernels see them."""
        return _pass(inputs, self, 0), _pass(inputs, self, 1)


@dataclass(frozen=True)
class ReadoutGradients:
    """What the readout alone contributes to each gradient.

    Attributes:
        query: dQ [B, T, H, D].
        reader: dYhat and P [2, P, H, C, M], with which each pass's writes were read.
        write: of the writes [2, P, H, C, M].
        start: of the memories at each chunk's start [P, ...].
        rows, steps: Q.dQ and P.dP, and dgamma [2, P, H, C].
        weight, bias: of the affine [H, M], fp32; None where there is none.
        dy: the upstream gradient.
    """

    query: Tensor
    reader: Tensor
    write: Tensor
    start: Memories
    rows: Tensor
    steps: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor


@dataclass(frozen=True)
class ScanGradients:
    """A reverse scan.

    Attributes:
        initial: adjoint of the initial memories, by rank [N, ...].
        stale: of the stale pair; None where the call has none.
        end: of the memories after each chunk [P, ...].
        base: of B [2, P, H, C, M]; None under "stale".
        parts: what each memory adds to the decay's gradient at a chunk's end [2, parts, P, H]; the parts
            of ``input_backward`` are still empty.
    """

    initial: Memories
    stale: Memories | None
    end: Memories
    base: Tensor | None
    parts: Tensor


def arrange(operands: Operands, *, layout: PackedLayout, rule: Rule) -> Inputs:
    """Operands in token order and their gates in chunk order.

    Raises:
        ValueError: update "corrected" with a phi that mixes slots.
    """
    if rule.corrected and rule.phi not in ELEMENTWISE_PHI:
        raise ValueError(
            f"update = 'corrected' with phi = {rule.phi!r}: these kernels have it for "
            f"{', '.join(ELEMENTWISE_PHI)}; use backend 'chunkwise'"
        )
    operands = Operands(*(None if x is None else x.contiguous() for x in operands))  # type: ignore[arg-type]
    return Inputs(operands, derive_gates(operands, layout), layout, rule)


def scan_forward(
    inputs: Inputs, initial: Memories, *, stale: Memories | None = None
) -> tuple[States, Memories]:
    """Run both memories over the documents.

    Args:
        inputs: of ``arrange``; the queries are not read.
        initial: memories before each document's first token, by rank [N, ...], fp32.
        stale: the pair [N, ...] where a call enters inside a chunk; None takes ``initial``.

    Returns:
        The states, and the memories after each document's last token, by rank [N, ...].
    """
    layout, every = inputs.layout, segment_chunks(inputs.layout.chunk_size)
    documents = layout.num_documents
    saved = inputs.memories(layout.segments(every).rank.shape[0])
    final, last = inputs.memories(documents), inputs.memories(documents)
    out = {"saved": saved, "final": final, "last": last}
    return _scan(inputs, inputs.whole, initial, stale, reader="readout_forward", **out), final


def rescan(inputs: Inputs, saved: Memories, *, stale: Memories | None = None) -> States:
    """The states of ``scan_forward`` from its segment starts, all segments side by side."""
    every = segment_chunks(inputs.layout.chunk_size)
    out = {"saved": None, "final": None, "last": None}
    return _scan(inputs, inputs.tables(every), saved, stale, reader="query_backward", **out)


def _scan(
    inputs: Inputs,
    tables: Tables,
    initial: Memories,
    stale: Memories | None,
    *,
    reader: str,
    saved: Memories | None,
    final: Memories | None,
    last: Memories | None,
) -> States:
    """``reader``, the kernel that goes on, finds the inner gradients stored where its tiles are no chunks."""
    c, corrected = inputs.layout.chunk_size, inputs.rule.corrected
    start = inputs.memories(inputs.layout.num_chunks, factor=True)
    gradient = inputs.scratch() if corrected or inputs.launch(reader).tokens < c else None
    inverse = inputs.inverse if corrected else None
    sides = [
        scan.Forward(
            x=inputs.written[memory],
            log_decay=inputs.gates.of(memory)[0],
            step=inputs.gates.of(memory)[1],
            inverse=_part(inverse, memory),
            initial=_contiguous(_side(initial, memory)),
            pair=_contiguous(_side(stale, memory)),
            saved=_side(saved, memory),
            start=_side(start, memory),
            final=_side(final, memory),
            last=_side(last, memory),
            gradient=_part(gradient, memory),
        )
        for memory in (0, 1)
    ]
    options = inputs.options("scan_forward")
    runs, blocks = tables.rank.shape[0], triton.cdiv(inputs.slots, options["Z"].BM)
    scan.scan_forward_kernel[(runs * inputs.heads, 2, blocks)](
        *sides,
        inputs.operands.alpha,
        tables,
        inputs.heads,
        inputs.layout.num_documents,
        segment_chunks(c),
        **options,
    )
    return States(start, stale, gradient, saved, last)


def readout_forward(inputs: Inputs, states: States) -> Tensor:
    """Outputs [B, T, H, V] in v's dtype from the states of ``scan_forward``."""
    operands, y = inputs.operands, torch.empty_like(inputs.operands.v)
    options = inputs.options("readout_forward")
    readout.readout_forward_kernel[_grid(inputs, options)](
        operands.q,
        *states.passes(inputs),
        operands.alpha,
        operands.readout_weight,
        operands.readout_bias,
        y,
        inputs.whole,
        inputs.layout.num_documents,
        inputs.heads,
        **options,
    )
    return y


def readout_backward(inputs: Inputs, states: States, dy: Tensor) -> ReadoutGradients:
    """Gradients of the readout for the upstream ``dy`` [B, T, H, V]."""
    operands, dy = inputs.operands, dy.contiguous()
    options = inputs.options("query_backward")
    tiles = options["Z"].TILES
    start = inputs.memories(inputs.layout.num_chunks, factor=True)
    reader, write, rows, steps = inputs.scratch(), inputs.scratch(), inputs.scratch(2), inputs.scratch(2)
    query = torch.empty_like(operands.q)
    weight, bias = (
        None if x is None else rows.new_empty(inputs.heads, inputs.layout.num_chunks * tiles, inputs.slots)
        for x in (operands.readout_weight, operands.readout_bias)
    )
    out = readout.Gradients(
        query=query,
        p=reader[1],
        y_hat=reader[0],
        key_write=write[0],
        value_write=write[1],
        key_start=start.key,
        value_start=start.value,
        key_rows=rows[0],
        value_rows=rows[1],
        key_step=steps[0],
        value_step=steps[1],
        weight=weight,
        bias=bias,
    )
    tables, passes = inputs.whole, states.passes(inputs)
    affine = (operands.readout_weight, operands.readout_bias)
    readout.query_backward_kernel[_grid(inputs, options)](
        operands.q,
        *passes,
        dy,
        operands.alpha,
        *affine,
        out,
        tables,
        inputs.layout.num_documents,
        inputs.heads,
        **options,
    )
    if tiles > 1:
        options = inputs.options("key_backward")
        readout.key_backward_kernel[(_grid(inputs, options)[0], options["Z"].TILES + 1, 2)](
            operands.q,
            *passes,
            dy,
            operands.alpha,
            out,
            tables,
            inputs.layout.num_documents,
            inputs.heads,
            **options,
        )
    weight, bias = (None if x is None else x.sum(1) for x in (weight, bias))
    return ReadoutGradients(query, reader, write, start, rows, steps, weight, bias, dy)


def scan_backward(
    inputs: Inputs,
    states: States,
    grads: ReadoutGradients,
    final: _Pair,
    *,
    outside: _Pair = (None, None),
) -> ScanGradients:
    """Run the adjoints from the last chunk to the first.

    Args:
        inputs, states, grads: of the stages before.
        final: adjoints of the final memories (key, value), by rank [N, ...], fp32; None is zero.
        outside: adjoints of the chunk-start pair of documents that end inside a chunk, by rank [N, ...],
            zero for the others; None is zero.
    """
    layout, options = inputs.layout, inputs.options("scan_backward")
    documents, chunks = layout.num_documents, layout.num_chunks
    initial, end = inputs.memories(documents), inputs.memories(chunks, factor=True)
    stale = None if states.pair is None else inputs.memories(documents)
    base = inputs.scratch() if inputs.rule.corrected else None
    blocks, tiles = triton.cdiv(inputs.slots, options["Z"].BM), inputs.options("inputs")["Z"].TILES
    extra = blocks if inputs.rule.corrected and outside != (None, None) else 0
    parts = grads.rows.new_empty(2, tiles + extra, chunks, inputs.heads)
    if extra:
        parts[:, tiles:].zero_()
    inverse = inputs.inverse if inputs.rule.corrected else None
    sides = [
        scan.Backward(
            x=inputs.written[memory],
            log_decay=inputs.gates.of(memory)[0],
            step=inputs.gates.of(memory)[1],
            inverse=_part(inverse, memory),
            start=_side(states.start, memory),
            pair=_contiguous(_side(states.pair, memory)),
            write=grads.write[memory],
            readout=_side(grads.start, memory),
            final=_contiguous(final[memory]),
            outside=_contiguous(outside[memory]),
            initial=_side(initial, memory),
            initial_pair=_side(stale, memory),
            end=_side(end, memory),
            base=_part(base, memory),
            decay=parts[memory, tiles:] if extra else None,
        )
        for memory in (0, 1)
    ]
    scan.scan_backward_kernel[(documents * inputs.heads, 2, blocks)](
        *sides, inputs.operands.alpha, inputs.whole, inputs.heads, documents, chunks, **options
    )
    return ScanGradients(initial, stale, end, base, parts)


def input_backward(
    inputs: Inputs, states: States, grads: ReadoutGradients, adjoints: ScanGradients
) -> Operands:
    """Gradients of all operands in token order and their dtypes; None for missing operands."""
    operands, layout, options = inputs.operands, inputs.layout, inputs.options("inputs")
    dx = (torch.empty_like(operands.k), torch.empty_like(operands.v))
    dalpha = torch.empty_like(operands.alpha)
    sides = [
        inputs_room.Side(
            left=(operands.q, grads.dy)[memory],
            right=grads.reader[memory],
            write=grads.write[memory],
            base=_part(adjoints.base, memory),
            end=_side(adjoints.end, memory),
            dx=dx[memory],
            rows=grads.rows[memory],
            dgamma=grads.steps[memory],
            parts=adjoints.parts[memory],
        )
        for memory in (0, 1)
    ]
    key, value = states.passes(inputs)
    inputs_room.inputs_kernel[_grid(inputs, options)](
        key,
        sides[0],
        value,
        sides[1],
        operands.alpha,
        dalpha,
        inputs.whole,
        layout.num_documents,
        layout.num_chunks,
        inputs.heads,
        **options,
    )
    gates = gate_gradients(
        grads.rows, grads.steps, adjoints.parts, inputs.gates, operands=operands, layout=layout
    )
    weight, bias = (
        None if grad is None or x is None else grad.to(x.dtype)
        for grad, x in ((grads.weight, operands.readout_weight), (grads.bias, operands.readout_bias))
    )
    return Operands(
        q=grads.query,
        k=dx[0],
        v=dx[1],
        alpha=dalpha,
        log_decay=gates[0],
        step_size=gates[1],
        value_log_decay=gates[2],
        value_step_size=gates[3],
        readout_weight=weight,
        readout_bias=bias,
    )


def from_tokens(inputs: Inputs, x: Tensor) -> Tensor:
    """Token order [B, T, H, F] to the stages' own order, here the same."""
    return x


def to_tokens(inputs: Inputs, x: Tensor, like: Tensor) -> Tensor:
    """The stages' own order to token order, in the shape and type of ``like``."""
    return x.to(like.dtype).view_as(like)


def _pass(inputs: Inputs, states: States, memory: int) -> Pass:
    return Pass(
        x=inputs.written[memory],
        log_decay=inputs.gates.of(memory)[0],
        step=inputs.gates.of(memory)[1],
        start=_side(states.start, memory),
        pair=_contiguous(_side(states.pair, memory)),
        gradient=_part(states.gradient, memory),
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _side(memories: Memories | None, memory: int) -> Tensor | None:
    return None if memories is None else (memories.key, memories.value)[memory]


def _part(stacked: Tensor | None, memory: int) -> Tensor | None:
    return None if stacked is None else stacked[memory]


def _grid(inputs: Inputs, options: dict[str, Any]) -> tuple[int, int]:
    return inputs.layout.num_chunks * inputs.heads, options["Z"].TILES
