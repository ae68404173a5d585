"""Bytes that a rank sends in a training step, counted at ``torch.distributed``, against the formulas.

State passing, per row of the batch, layer and boundary, forward and again backward, whatever the length:

    state    H M (D + V) numbers of 4 bytes, fp32 whatever the activations are; 2 H M D with V = D
    halo     (K - 1) 2 H D activations: the last inputs of the convolution on q and k

All-to-all, per layer: what of this rank's T/sp tokens of the rows belongs to the heads of others: (sp - 1)/sp
of q, k, v, alpha and the gates to their ranks and of y back, and as much of gradients in the backward pass.
In the buffer every operand is filled up to 16 bytes for each rank. The halo is the same.

Once a step, in both: the gradients of all parameters, and 8 bytes for the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.sequence_parallel.ranks import Ranks
from benchmarks.sequence_parallel.subject import Subject, make_batches
from trellis_dist.models.config import ModelConfig

__all__ = ["FORMULAS", "counted", "halo_bytes", "measure_traffic", "state_bytes"]

FP32, ALIGNMENT = 4, 16


def state_bytes(model: ModelConfig, rows: int = 1) -> int:
    """Of both memories of one layer."""
    return 2 * model.num_heads * model.trellis.slots * model.head_dim * FP32 * rows


def halo_bytes(model: ModelConfig, rows: int = 1, itemsize: int = FP32) -> int:
    """Of the convolution's inputs before a segment; 0 without a convolution."""
    return max(model.trellis.conv_kernel - 1, 0) * 2 * model.dim * itemsize * rows


def _state_passing(model: ModelConfig, rows: int, length: int, sp: int, rank: int) -> dict[str, int]:
    """Bytes that ``rank`` sends in a layer, right in its forward pass and left in its backward pass."""
    size = state_bytes(model, rows) + halo_bytes(model, rows)
    return {"right": size * (rank < sp - 1), "left": size * (rank > 0), "exchanged": 0}


def _all_to_all(model: ModelConfig, rows: int, length: int, sp: int, rank: int) -> dict[str, int]:
    """Bytes that ``rank`` gives the others in a layer; every gate is learned."""
    options, width = model.trellis, model.head_dim
    gates = 2 * (2 if options.value_gates == "own" else 1)
    per_number = FP32 * rows * (length // sp) * (model.num_heads // sp)
    operands = [per_number * size for size in (width, width, width, options.slots, *[1] * gates, width)]
    of_a_peer = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in operands)
    halo = halo_bytes(model, rows)
    return {
        "right": halo * (rank < sp - 1),
        "left": halo * (rank > 0),
        "exchanged": 2 * (sp - 1) * of_a_peer,
    }


# Bytes of one layer and micro-batch by mode; arguments model, rows, whole length, sp, rank.
FORMULAS: dict[str, Callable[[ModelConfig, int, int, int, int], dict[str, int]]] = {
    "state_passing": _state_passing,
    "all_to_all": _all_to_all,
}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this process hands to ``torch.distributed`` and that leave it, by kind.

    "right" and "left" are sends to a higher and a lower rank; "exchanged" what all-to-all gives away;
    "summed" the operands of all-reduces of gradients, "scalars" those of at most 64 bytes; "other" any other
    collective's.
    """
    found = dict.fromkeys(("right", "left", "exchanged", "summed", "scalars", "other"), 0)

    def isend(tensor: Tensor, dst: int, *_: Any, **__: Any) -> None:
        found["right" if dst > dist.get_rank() else "left"] += tensor.nbytes

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> None:
        found["summed" if tensor.nbytes > 64 else "scalars"] += tensor.nbytes

    def all_to_all_single(
        output: Tensor, tensor: Tensor, *_: Any, group: dist.ProcessGroup | None = None, **__: Any
    ) -> None:
        ranks = dist.get_world_size(group)
        found["exchanged"] += tensor.nbytes * (ranks - 1) // ranks

    def other(*arguments: Any, **_: Any) -> None:
        found["other"] += sum(x.nbytes for x in arguments if isinstance(x, Tensor))

    counters: dict[str, Callable[..., None]] = {"isend": isend, "send": isend}
    counters |= {"all_reduce": all_reduce, "all_to_all_single": all_to_all_single}
    for name in ("broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"):
        counters[name] = other
    for name in ("all_to_all", "batch_isend_irecv"):
        counters[name] = other
    with _wrapped(counters):
        yield found


@contextlib.contextmanager
def _wrapped(counters: dict[str, Callable[..., None]]) -> Iterator[None]:
    real = {name: getattr(dist, name) for name in counters}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counters[name](*arguments, **named)
            return real[name](*arguments, **named)

        return call

    for name in counters:
        setattr(dist, name, wrap(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def measure_traffic(
    model: ModelConfig, *, mode: str, sp: int, rows: int, lengths: tuple[int, ...], micro_batches: int
) -> dict[str, Any]:
    """Per length: what every rank sent per layer and micro-batch, what the formula says, and once a step."""
    with Ranks(sp) as ranks:
        counts = {
            length: ranks.run(_count, model, mode, sp, rows, length, micro_batches) for length in lengths
        }
    found = {}
    for length, ranks_found in counts.items():
        per_layer, formula = [], []
        for rank, count in enumerate(ranks_found):
            kinds = ("right", "left", "exchanged")
            per_layer.append({kind: count[kind] / model.num_layers / micro_batches for kind in kinds})
            formula.append(FORMULAS[mode](model, rows, length, sp, rank))
        once = {kind: ranks_found[0][kind] for kind in ("summed", "scalars", "other")}
        found[str(length)] = {
            "per_layer": per_layer,
            "formula": formula,
            "once_a_step": once,
            "equal": per_layer == formula,
        }
    parameters = counts[lengths[0]][0]["parameters"]
    return {"mode": mode, "sp": sp, "rows": rows, "lengths": found, "gradient_bytes": FP32 * parameters}


def _count(
    model: ModelConfig, mode: str, sp: int, rows: int, length: int, micro_batches: int
) -> dict[str, int]:
    """On one rank: the bytes of one step."""
    engine = Subject(model, sp=sp, mode=mode).build()
    batches = make_batches(model.vocab_size, rows=rows, length=length, micro_batches=micro_batches)
    with counted() as found:
        engine.train_step(batches, lr=1e-3, valid_tokens=micro_batches * rows * length)
    return found | {"parameters": sum(parameter.numel() for parameter in engine.model.parameters())}
