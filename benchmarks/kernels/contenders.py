"""What is timed: the operation itself on any backend, and each rival on operands of the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.plain import plain_loop
from benchmarks.kernels.sizes import Shape, make_operands
from benchmarks.kernels.timing import Call
from kernels import CompressState, compress_kv, decode_step

__all__ = ["CPU_CONTENDERS", "RIVALS", "compress", "compress_call", "cpu_call", "decode_layers", "plain_call"]
__all__ += ["rival_call"]

CPU_CONTENDERS = ("chunkwise", "corrected", "plain_loop", "plain_loop_indexed")


def compress(operands: Mapping[str, Any], shape: Shape, backend: str = "auto") -> Tensor:
    """y of ``compress_kv`` with its default activations."""
    return compress_kv(**operands, chunk_size=shape.chunk, update=shape.update, backend=backend)[0]


def compress_call(shape: Shape, *, backend: str = "auto", **how: Any) -> Call:
    """The operation on fresh operands; ``how``: dtype, device, seed."""
    return Call(make_operands(shape, **how), lambda x: compress(x, shape, backend))


def plain_call(shape: Shape, *, indexed: bool = False, **how: Any) -> Call:
    """The plain loop on the same operands as ``compress_call``."""
    return Call(make_operands(shape, **how), lambda x: plain_loop(x, chunk_size=shape.chunk, indexed=indexed))


def cpu_call(name: str, shape: Shape, **how: Any) -> Call:
    """One of CPU_CONTENDERS on fresh operands."""
    assert name in CPU_CONTENDERS, f"{name!r} is none of {CPU_CONTENDERS}"
    if name.startswith("plain_loop"):
        return plain_call(shape, indexed=name == "plain_loop_indexed", **how)
    update = "corrected" if name == "corrected" else "stale"
    return compress_call(dataclasses.replace(shape, update=update), backend="chunkwise", **how)


def decode_layers(shape: Shape, *, layers: int, backend: str = "auto", **how: Any) -> Callable[[], None]:
    """One ``decode_step`` in each of ``layers`` layers, with states in the middle of a chunk."""
    made = make_operands(dataclasses.replace(shape, length=layers), **how)
    tokens = [{name: x.detach()[:, i].contiguous() for name, x in made.items()} for i in range(layers)]

    def memory() -> Tensor:
        return 0.1 * torch.randn(shape.batch, shape.heads, shape.slots, shape.width, device=how["device"])

    inside = shape.chunk // 2
    states = [CompressState(memory(), memory(), memory(), memory(), inside) for _ in range(layers)]
    options: dict[str, Any] = {"chunk_size": shape.chunk, "update": shape.update, "backend": backend}

    @torch.no_grad()
    def step() -> None:
        for token, state in zip(tokens, states, strict=True):
            decode_step(**token, state=state, **options)

    return step


def rival_call(name: str, shape: Shape, **how: Any) -> Call:
    """One of RIVALS on fresh operands. Raises ImportError where its package is not installed."""
    return RIVALS[name](shape, **how)


def _attention(shape: Shape, **how: Any) -> Call:
    """Causal softmax attention, [B, H, T, D] as it wants them."""
    made = make_operands(shape, **how)
    operands = {name: _leaf(made[name].transpose(1, 2)) for name in ("q", "k", "v")}
    return Call(
        operands,
        lambda x: functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True),
    )


def _gsa(shape: Shape, **how: Any) -> Call:
    """Gated slot attention: two passes over M slots; the chunk is its own choice and changes no result."""
    from fla.ops.gsa import chunk_gsa

    made = make_operands(shape, **how)
    gate = functional.logsigmoid(made["alpha"].float())
    operands = {name: made[name] for name in ("q", "k", "v")}
    operands |= {"s": _leaf((1 - gate.exp()).to(made["q"])), "g": _leaf(gate.to(made["q"]))}
    return Call(operands, lambda x: chunk_gsa(**x)[0])


def _gated_delta_rule(shape: Shape, **how: Any) -> Call:
    """Gated DeltaNet; the chunk is its own choice and changes no result."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    made = make_operands(shape, **how)
    operands = {name: made[name] for name in ("q", "k", "v")}
    operands |= {"g": made["log_decay"], "beta": _leaf(made["step_size"].to(made["q"]))}
    return Call(operands, lambda x: chunk_gated_delta_rule(**x)[0])


def _ttt_linear(shape: Shape, **how: Any) -> Call:
    """TTT-linear; like ours, its chunk (mini-batch) is part of the function."""
    from fla.ops.ttt import chunk_ttt_linear

    made = make_operands(shape, **how)
    operands = {name: made[name] for name in ("q", "k", "v")}
    ones = torch.ones(shape.heads, shape.width, dtype=made["q"].dtype, device=made["q"].device)
    operands |= {"w": _leaf(ones), "b": _leaf(torch.zeros_like(ones))}
    operands["eta"] = _leaf(made["step_size"][..., None].to(made["q"]))
    return Call(operands, lambda x: chunk_ttt_linear(**x, chunk_size=shape.chunk)[0])


def _leaf(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


RIVALS: dict[str, Callable[..., Call]] = {
    "attention": _attention,
    "chunk_gsa": _gsa,
    "chunk_gated_delta_rule": _gated_delta_rule,
    "ttt_linear": _ttt_linear,
}
