"""The operation as two custom operators, ``trellis::compress`` and ``trellis::compress_backward``.

To torch.compile, activation checkpointing and autograd a call is one node: shapes are known without running
it, nothing inside it is traced, and backward is a node of its own (without a second derivative). Documents
travel as a host tensor of their bounds, so that another packing is another input and not another graph.

Shapes as in ``kernels.compress``; memories [N, H, M, .] in the caller's order of documents, G saved ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import chunkwise
from kernels.layout import KEPT, PackedLayout
from kernels.types import Memories, Operands, Rule

__all__ = ["compress", "find_layout", "full_precision"]


def compress(
    operands: Operands,
    initial: Memories,
    stale: Memories | None,
    *,
    bounds: Tensor | None,
    offsets: Sequence[int],
    chunk_size: int,
    rule: Rule,
    backend: str,
) -> tuple[Tensor, Memories, Memories]:
    """Output, final memories and final chunk-start pair; differentiable in every tensor.

    Args:
        operands, initial, stale: as in ``kernels.chunkwise.forward``.
        bounds: first token of each document and the number of tokens, int64 [N + 1] on the CPU; None for one
            document a row.
        offsets: of each document, or one for all.
        chunk_size, rule: the function.
        backend: "chunkwise" or "triton".
    """
    pair = (None, None) if stale is None else (stale.key, stale.value)
    choices = (offsets, chunk_size, rule.phi, rule.readout, rule.update, backend)
    y, key, value, key_start, value_start, *_ = torch.ops.trellis.compress(
        *operands, initial.key, initial.value, *pair, bounds, *choices
    )
    return y, Memories(key, value), Memories(key_start, value_start)


def find_layout(
    operands: Operands, bounds: Tensor | None, offsets: Sequence[int], chunk_size: int
) -> PackedLayout:
    """The chunk grid of a call, on the operands' device; the same object for every layer of a model.

    Raises:
        ValueError: bounds of another number of tokens (compiled graphs see it here only).
    """
    batch, length = operands.q.shape[:2]
    if bounds is None:
        lengths = (length,) * batch
    else:
        ends: list[int] = bounds.tolist()
        if ends[-1] != batch * length:
            raise ValueError(
                f"layout counts {ends[-1]} tokens, the operands {batch * length}: they should agree"
            )
        lengths = tuple(end - begin for begin, end in itertools.pairwise(ends))
    return _cached_layout(lengths, tuple(offsets), chunk_size, operands.q.device)


@functools.lru_cache(maxsize=KEPT)
def _cached_layout(
    lengths: tuple[int, ...], offsets: tuple[int, ...], chunk_size: int, device: torch.device
) -> PackedLayout:
    one = offsets[0] if len(offsets) == 1 else offsets
    return PackedLayout.of(lengths, chunk_size, offsets=one).to(device)


def _module(backend: str) -> ModuleType:
    if backend == "chunkwise":
        return chunkwise
    import kernels.triton.compress

    return kernels.triton.compress


@torch.library.custom_op("trellis::compress", mutates_args=())
def _compress(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    value_log_decay: Tensor | None,
    value_step_size: Tensor | None,
    readout_weight: Tensor | None,
    readout_bias: Tensor | None,
    key_memory: Tensor,
    value_memory: Tensor,
    key_chunk_start: Tensor | None,
    value_chunk_start: Tensor | None,
    bounds: Tensor | None,
    offsets: Sequence[int],
    chunk_size: int,
    phi: str,
    readout: str,
    update: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y; final key and value memory; final chunk-start pair; saved key and value memories [G, H, M, .]."""
    gates = (log_decay, step_size, value_log_decay, value_step_size)
    operands = Operands(q, k, v, alpha, *gates, readout_weight, readout_bias)
    with full_precision(q):
        y, final, last, saved = _module(backend).forward(
            operands,
            Memories(key_memory, value_memory),
            _pair(key_chunk_start, value_chunk_start),
            layout=find_layout(operands, bounds, offsets, chunk_size),
            rule=Rule(phi, readout, update),
        )
    return y, final.key, final.value, last.key, last.value, saved.key, saved.value


@_compress.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    v, key, value, bounds, offsets, chunk_size = args[2], args[10], args[11], *args[14:17]
    if bounds is None and len(offsets) == 1:
        count = _module(args[20]).saved_count(v.shape[:3], chunk_size, offset=offsets[0], device=v.device)
    else:  # depends on the documents
        count = torch.library.get_ctx().new_dynamic_size()
    return (
        v.new_empty(v.shape),
        *(x.new_empty(x.shape) for x in (key, value, key, value)),
        *(x.new_empty(count, *x.shape[1:]) for x in (key, value)),
    )


@torch.library.custom_op("trellis::compress_backward", mutates_args=())
def _compress_backward(
    tensors: Sequence[Tensor],
    present: Sequence[bool],
    offsets: Sequence[int],
    chunk_size: int,
    phi: str,
    readout: str,
    update: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of the operands, initial memories and stale pair that are there, in that order.

    ``tensors`` are those marked ``present`` of: 10 operands, the stale pair, the saved memories, bounds, dy,
    gradients of the final memories, gradients of the final chunk-start pair.
    """
    slots = _unpack(tensors, present)
    operands = Operands(*slots[:10])  # type: ignore[arg-type]
    saved = Memories(*slots[12:14])  # type: ignore[arg-type]
    with full_precision(operands.q):
        grads, initial, stale = _module(backend).backward(
            operands,
            saved,
            _pair(*slots[10:12]),
            slots[15],
            (slots[16], slots[17]),
            (slots[18], slots[19]),
            layout=find_layout(operands, slots[14], offsets, chunk_size),
            rule=Rule(phi, readout, update),
        )
    pair = () if stale is None else (stale.key, stale.value)
    return [x for x in (*grads, initial.key, initial.value, *pair) if x is not None]


@_compress_backward.register_fake
def _(tensors: Sequence[Tensor], present: Sequence[bool], *args: Any) -> list[Tensor]:
    slots = _unpack(tensors, present)
    operands = [x for x in slots[:10] if x is not None]
    pair = [x for x in slots[10:12] if x is not None]
    bounds, saved = slots[14], [x for x in slots[12:14] if x is not None]
    documents = operands[0].shape[0] if bounds is None else bounds.shape[0] - 1
    initial = [x.new_empty(documents, *x.shape[1:]) for x in saved]
    return [*(x.new_empty(x.shape) for x in operands), *initial, *(x.new_empty(x.shape) for x in pair)]


def _unpack(tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    found = iter(tensors)
    return [next(found) if there else None for there in present]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.choices = inputs[15:]
    ctx.save_for_backward(*inputs[:10], *inputs[12:14], *output[5:7], inputs[14])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    slots = (*ctx.saved_tensors, *grads[:5])
    present = [x is not None for x in slots]
    found = iter(
        torch.ops.trellis.compress_backward([x for x in slots if x is not None], present, *ctx.choices)
    )
    operands = [next(found) if there else None for there in present[:10]]
    initial = (next(found), next(found))
    pair = [next(found) if there else None for there in present[10:12]]
    return *operands, *initial, *pair, None, *(None for _ in ctx.choices)


_compress.register_autograd(_backward, setup_context=_setup_context)


def _pair(key: Tensor | None, value: Tensor | None) -> Memories | None:
    return None if key is None or value is None else Memories(key, value)


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: memories and gates stay fp32 whatever surrounds the call."""
    return torch.autocast(device_type=x.device.type, enabled=False)
