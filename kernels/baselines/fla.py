"""flash-linear-attention's Triton kernels in the form of `grid.Operation`, for tensors on a GPU.

The same functions as this package's own chunkwise forms, up to rounding: their products are in the type of
the tokens (bf16, or TF32 of fp32). Written against fla-core 0.6; its signatures are checked on every machine,
its signs against its own loops over tokens, and it has NOT RUN ON A GPU YET (tests/kernels/baselines/
test_fla_gpu.py would show it). ABC starts its first token otherwise there, and TTT-linear and Titans compute
another function (kernels/baselines/ttt.py), so those three have no such form.

Shapes as in `grid`; scale is 1 everywhere: what a kind scales, it scales before.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.baselines.delta_rule import gated_delta_rule
from kernels.baselines.grid import Memory, Operation
from kernels.baselines.linear_attention import decayed_linear_attention
from kernels.baselines.rwkv7 import generalised_delta_rule
from kernels.baselines.slots import gated_slot_attention
from kernels.layout import PackedLayout

__all__ = ["FORMS", "Form", "choose", "on_gpu", "run"]


@dataclass(frozen=True)
class Form:
    """One of its functions.

    Attributes:
        module, function: where it is.
        arguments: the tokens of ours as its keywords.
        pair: whether it takes and returns memories as a pair.
    """

    module: str
    function: str
    arguments: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    pair: bool = False

    def load(self) -> Callable[..., Any]:
        """Its function. Raises ValueError: flash-linear-attention is not installed."""
        if importlib.util.find_spec("fla") is None:
            raise ValueError(
                'model.baselines.backend = "fla" needs flash-linear-attention on a GPU: pip install '
                'fla-core, or set model.baselines.backend = "torch"'
            )
        return getattr(importlib.import_module(self.module), self.function)  # type: ignore[no-any-return]


def _decayed(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q and k in the type of v: under autocast a convolution's weights make them wider than raw values."""
    named = {name: tokens[name].to(tokens["v"].dtype) for name in ("q", "k", "v")}
    return {**named, "g": tokens["log_decay"]} if "log_decay" in tokens else named


def _delta(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**_decayed(tokens), "beta": tokens["beta"].to(tokens["v"].dtype)}


def _slots(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**_decayed(tokens), "s": tokens["write"].to(tokens["v"].dtype)}


def _generalised(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its S_t = (diag(w) + b a^T) S_{t-1} + k v^T: a = -h, b = rate o h."""
    dtype, key = tokens["v"].dtype, tokens["key"]
    q, k, v, erased, put = (
        x.to(dtype) for x in (tokens["q"], tokens["k"], tokens["v"], -key, tokens["rate"] * key)
    )
    return {"r": q, "w": tokens["log_decay"], "k": k, "v": v, "a": erased, "b": put}


# By operation, and whether its tokens decay.
FORMS: dict[tuple[Operation, bool], Form] = {
    (gated_delta_rule, True): Form("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _delta),
    (gated_delta_rule, False): Form("fla.ops.delta_rule", "chunk_delta_rule", _delta),
    (decayed_linear_attention, True): Form("fla.ops.simple_gla", "chunk_simple_gla", _decayed),
    (decayed_linear_attention, False): Form("fla.ops.simple_gla", "chunk_simple_gla", _decayed),
    (gated_slot_attention, True): Form("fla.ops.gsa", "chunk_gsa", _slots, pair=True),
    (generalised_delta_rule, True): Form("fla.ops.rwkv7", "chunk_rwkv7", _generalised),
}


def on_gpu(operation: Operation) -> Operation:
    """``operation``, by its form here where tensors are on a GPU and no fp64; itself where it has none."""
    if all(known is not operation for known, _ in FORMS):
        return operation

    def call(
        tokens: Mapping[str, Tensor], weights: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
    ) -> tuple[Tensor, Memory]:
        v = tokens["v"]
        if not v.is_cuda or v.dtype == torch.float64:
            return operation(tokens, weights, memory, layout)
        return run(*choose(operation, tokens), memory, layout)

    return call


def choose(operation: Operation, tokens: Mapping[str, Tensor]) -> tuple[Form, Mapping[str, Tensor]]:
    """The form of ``operation`` and what it is given: ``tokens``, with decays of 1 where there are none.

    That only for the delta rule in fp32, which its function without decays refuses.
    """
    if operation is gated_delta_rule and tokens["v"].dtype == torch.float32 and "log_decay" not in tokens:
        tokens = {**tokens, "log_decay": torch.zeros_like(tokens["beta"])}
    return FORMS[operation, "log_decay" in tokens], tokens


def run(
    form: Form, tokens: Mapping[str, Tensor], memory: Memory, layout: PackedLayout
) -> tuple[Tensor, Memory]:
    """One call of ``form``; see `grid.Operation`. Documents may end anywhere: the kernels have no grid."""
    v, initial = tokens["v"], tuple(m.contiguous() for m in memory)
    packed = layout.num_documents != len(v)
    bounds = {"cu_seqlens": layout.bounds.to(v.device, non_blocking=True)} if packed else {}
    y, final = form.load()(
        **form.arguments(tokens),
        scale=1.0,
        initial_state=initial if form.pair else initial[0],
        output_final_state=True,
        **bounds,
    )
    return y.to(v.dtype), tuple(final) if form.pair else (final,)
