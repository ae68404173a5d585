"""The Trellis mixer (arXiv 2512.23852, figure 1 and equations 13-14; docs/math.md).

Shapes: B rows, T tokens, H heads, D = V head width, M slots, F = H D.

    q, k = l2norm(silu(conv(W_q x))), l2norm(silu(conv(W_k x)))     v = l2norm(W_v x)
    alpha = rmsnorm(W_alpha x)     log_decay = logsigmoid(w_b x + b_b)     step = s sigmoid(w_g x + b_g)
    out = W_o (rmsnorm_head(compress_kv(q, k, v, alpha, log_decay, step)) * gelu(W_z x))

With ``conv_values`` v is convolved as q and k are, with ``conv_targets`` alpha (before its norm); with
``gate_form`` "rate" log_decay is -exp(A_b) softplus(w_b x + b_b). With ``value_gates`` "own" the value pass
has a log_decay and a step of its own, made alike; with an affine readout compress_kv takes its weight and
bias [H, M] too. With ``targets`` "values" alpha is what v is before its norm, M = D. ``skip_values`` adds
d v, d [H], to what compress_kv returns.

The SiLU after the convolution is our choice (``conv_activation``): the paper names none, the DeltaNet family
has it. At 1M bytes of text (2 layers, width 96, 2 seeds) bits per byte were 2.54 and 2.43 with it, 2.48 and
2.48 without: undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import CompressState, compress_kv, decode_step, prefill
from trellis_dist.models.carry import CarriedRows
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.conv import ConvFunction, causal_conv, last_inputs
from trellis_dist.models.init import (
    Constant,
    Identity,
    Initial,
    InverseSoftplus,
    LogUniform,
    Normal,
    new_parameter,
)
from trellis_dist.models.linear import ColumnFunction, RowFunction, linear, linear_joined
from trellis_dist.models.mixers.trellis_state import TrellisState
from trellis_dist.models.norm import l2_normalise, rms_normalise
from trellis_dist.models.pads import FrontPads
from trellis_dist.models.parallel_kind import ParallelKind
from trellis_dist.models.region import Region, call

__all__ = ["TrellisMixer"]


class _Projected(NamedTuple):
    """The fused input projection, cut up.

    What the convolution reads comes first, W = 2F of q and k and more where v and alpha are convolved too,
    then v [F] and alpha [H M] where they are not, the output gate [F] and [H] for each gate that is learned.
    """

    convolved: Tensor
    value: Tensor | None
    alpha: Tensor | None
    output_gate: Tensor
    step: Tensor
    decay: Tensor | None = None
    value_step: Tensor | None = None
    value_decay: Tensor | None = None


class TrellisMixer(nn.Module):
    """One layer's compressed memory.

    Attributes:
        operation: called like ``kernels.compress_kv``; parallel/ replaces it to pass states between ranks.
        convolution: called like ``conv.causal_conv``; parallel/ replaces it to fetch the halo.
        column, row: like ``linear.linear_joined`` and ``linear.linear``; parallel/ replaces them to split
            the heads. ``column`` may return more tokens than it was given.
        region: calls what comes before and after the operation; parallel/ replaces it to recompute that
            in the backward pass.
    """

    step_weight: nn.Parameter
    step_bias: nn.Parameter
    decay_bias: nn.Parameter
    value_step_bias: nn.Parameter
    value_decay_bias: nn.Parameter

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.options, self.gate = config, config.trellis, config.gate(layer)
        self.layer = layer
        self.operation: Callable[..., tuple[Tensor, CompressState | None]] = compress_kv
        self.convolution: ConvFunction = causal_conv
        self.column: ColumnFunction = linear_joined
        self.row: RowFunction = linear
        self.region: Region = call
        heads, slots, width = config.num_heads, self.options.slots, config.dim
        weight = Normal(config.init_std)
        sharded: dict[str, Any] = {"kind": ParallelKind.SHARDED, "dim": 0}
        self.q_weight = new_parameter(width, width, initial=weight, **sharded)
        self.k_weight = new_parameter(width, width, initial=weight, **sharded)
        self.v_weight = new_parameter(width, width, initial=weight, **sharded)
        self.output_gate_weight = new_parameter(width, width, initial=weight, **sharded)
        if self.options.targets == "own":
            self.alpha_weight = new_parameter(heads * slots, width, initial=weight, **sharded)
        self._learned_gates: list[str] = []
        self._add_gates("", sharded)
        if self.options.value_gates == "own":
            self._add_gates("value_", sharded)
        self._add_affine(sharded)
        self._add_convolution(sharded)
        self._add_initial_memory(sharded)
        if self.options.skip_values:
            self.skip = new_parameter(heads, initial=Constant(1.0), **sharded)
        self.norm_weight = new_parameter(heads, config.head_dim, initial=Constant(1.0), **sharded)
        self.out_weight = new_parameter(
            width, width, initial=Normal(config.mixer_out_std), kind=ParallelKind.SHARDED, dim=1
        )

    def _add_gates(self, prefix: str, sharded: dict[str, Any]) -> None:
        """Step size and, where it is learned, forget gate of one pass: a weight [H, dim] and a bias [H]."""
        heads, rate = self.config.num_heads, self._as_rate(prefix)
        step_bias, gate_bias = self._first_biases(own=bool(prefix))
        biases: dict[str, Initial] = {"step": Constant(step_bias)}
        if self.gate == "learned":
            biases["decay"] = InverseSoftplus(0.001, 0.1) if rate else Constant(gate_bias)
            if rate:
                parameter = new_parameter(heads, initial=LogUniform(1.0, 16.0), **sharded)
                self.register_parameter(f"{prefix}decay_rate", parameter)
        for name, bias in biases.items():
            weight = new_parameter(heads, self.config.dim, initial=Normal(self.config.init_std), **sharded)
            self.register_parameter(f"{prefix}{name}_weight", weight)
            constant = new_parameter(heads, initial=bias, **sharded)
            self.register_parameter(f"{prefix}{name}_bias", constant)
            self._learned_gates.append(prefix + name)

    def _as_rate(self, prefix: str) -> bool:
        """Whether a pass's learned forget gate is a rate; one with a bias of its own is not."""
        return self.options.gate_form == "rate" and (prefix == "" or self.options.value_gate_bias is None)

    def _first_biases(self, *, own: bool) -> tuple[float, float]:
        """Of the step size and the forget gate, of both passes or of the value pass's own."""
        options = self.options
        step = options.value_step_size_bias if own else None
        gate = options.value_gate_bias if own else None
        return (
            options.step_size_bias if step is None else step,
            options.gate_bias if gate is None else gate,
        )

    def _add_affine(self, sharded: dict[str, Any]) -> None:
        """Of one dimension, as biases and norms of vectors are: weight decay leaves those alone."""
        if self.options.learns_affine:
            size = self.config.num_heads * self.options.slots
            self.readout_weight = new_parameter(size, initial=Constant(1.0), **sharded)
            self.readout_bias = new_parameter(size, initial=Constant(0.0), **sharded)

    def _add_convolution(self, sharded: dict[str, Any]) -> None:
        taps = self.options.conv_kernel
        self._convolved = ["q", "k"]
        self._convolved += ["v"] if self.options.conv_values else []
        self._convolved += ["alpha"] if self.options.conv_targets else []
        for name in self._convolved if taps > 0 else []:
            width = len(getattr(self, f"{name}_weight"))
            weight = new_parameter(width, taps, initial=Normal(taps**-0.5), **sharded)
            self.register_parameter(f"{name}_conv_weight", weight)

    def _add_initial_memory(self, sharded: dict[str, Any]) -> None:
        if self.options.learned_initial_memory:
            shape = (self.config.num_heads, self.options.slots, self.config.head_dim)
            normal = Normal(self.config.init_std)
            value = Identity() if self.options.initial_value_memory == "identity" else normal
            self.initial_key_memory = new_parameter(*shape, initial=normal, **sharded)
            self.initial_value_memory = new_parameter(*shape, initial=value, **sharded)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; B = 1 when ``context`` holds several documents."""
        if context.carried is not None:
            return self._continue(x, context, context.carried)
        inputs, output_gate = self.region(self._before, x, context)
        documents = len(output_gate) if context.cu_seqlens is None else context.cu_seqlens.shape[0] - 1
        learned = self.options.learned_initial_memory
        y, _ = self.operation(
            **inputs,
            **self._settings(),
            initial_state=self._first_memory(documents) if learned else None,
            layout=context.layout(self.options.chunk_size),
        )
        return self.region(self._output, y, inputs["v"], output_gate)  # type: ignore[no-any-return]

    def _before(self, x: Tensor, context: SequenceContext) -> tuple[dict[str, Any], Tensor]:
        """What the operation takes per token, and the output gate [B, T, F]."""
        projected = self._project(x)
        return self._inputs(projected, edges=context.edges), projected.output_gate

    def _continue(self, x: Tensor, context: SequenceContext, rows: CarriedRows) -> Tensor:
        """As ``forward``, where rows take over states from rows before them and leave their own."""
        inputs, output_gate, tail = self.region(self._before_carried, x, context)
        layout = context.layout(self.options.chunk_size)
        assert layout is not None, "rows that carry states are packed"
        offsets = layout.offsets
        y, final = self.operation(
            **inputs,
            **self._settings(),
            initial_state=rows.memory(self.layer, self._first_memory(len(offsets)), offsets),
            layout=layout,
            output_final_state=True,
        )
        assert final is not None, "the operation returned no state although one was asked for"
        rows.leave(self.layer, final, tail)
        return self.region(self._output, y, inputs["v"], output_gate)  # type: ignore[no-any-return]

    def _before_carried(
        self, x: Tensor, context: SequenceContext
    ) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """As ``_before``, and the last inputs of the convolution [R, K-1, W] in each of the R rows."""
        projected = self._project(x)
        if self.options.conv_kernel == 0:
            return self._inputs(projected), projected.output_gate, None
        assert context.carried is not None, "asked for where rows take over states"
        tail = context.carried.tail(self.layer, projected.convolved)
        inputs = self._inputs(projected, edges=context.edges, tail=tail)
        return inputs, projected.output_gate, last_inputs(tail, projected.convolved)

    @property
    def pads_within(self) -> int:
        """Tokens that may follow pads without being cut: a chunk."""
        return self.options.chunk_size

    def init_state(self, batch: int) -> TrellisState:
        """The state before the first token of ``batch`` rows."""
        taps, width = self.options.conv_kernel, self._convolved_width
        tail = self.q_weight.new_zeros(batch, taps - 1, width) if taps > 0 else None
        first = self._first_memory(batch)
        # Of its own: a learned memory would be a view of the parameter, which training goes on to change.
        key, value = first.key_memory.detach().clone(), first.value_memory.detach().clone()
        return TrellisState(memory=CompressState(key, value), tail=tail)

    def prefill(
        self, x: Tensor, state: TrellisState, pads: FrontPads | None = None
    ) -> tuple[Tensor, TrellisState]:
        """Continue ``state`` over x [B, T, dim]; returns ([B, T, dim], the state after it)."""
        projected = self._project(x)
        if pads is not None and state.tail is not None:
            tail, convolved = pads.close_up(state.tail, projected.convolved)
            projected, state = projected._replace(convolved=convolved), replace(state, tail=tail)
        counts = None if pads is None else pads.counts
        out, memory = self._read(projected, state, pads=counts)
        assert memory is not None, "a prefill returns its state unless told not to"
        return out, self._advance(state, memory, projected.convolved)

    def after(self, x: Tensor, state: TrellisState) -> Tensor:
        """As ``prefill``, without the state after it."""
        return self._read(self._project(x), state, output_final_state=False)[0]

    def _read(
        self, projected: _Projected, state: TrellisState, **options: Any
    ) -> tuple[Tensor, CompressState | None]:
        inputs = self._inputs(projected, tail=state.tail)
        y, memory = prefill(**inputs, **self._settings(), state=state.memory, **options)
        return self._output(y, inputs["v"], projected.output_gate), memory

    def decode_step(self, x: Tensor, state: TrellisState) -> tuple[Tensor, TrellisState]:
        """One token: x [B, dim] -> ([B, dim], the state after it)."""
        projected = self._project(x.unsqueeze(1))
        token = {name: x.squeeze(1) for name, x in self._inputs(projected, tail=state.tail).items()}
        y, memory = decode_step(**token, state=state.memory, **self._settings())
        out = self._output(y.unsqueeze(1), token["v"].unsqueeze(1), projected.output_gate).squeeze(1)
        return out, self._advance(state, memory, projected.convolved)

    def _project(self, x: Tensor) -> _Projected:
        """Every input projection in one matmul; copying the weights together costs 1/T of it."""
        own = ["alpha"] if self.options.targets == "own" else []
        plain = [name for name in ("v", "output_gate", *own) if name not in self._convolved]
        names = [*self._convolved, *plain, *self._learned_gates]
        weights: list[Tensor] = [getattr(self, f"{name}_weight") for name in names]
        sizes = [self._convolved_width, *(len(weight) for weight in weights[len(self._convolved) :])]
        convolved, *parts = self.column(x, weights).split(sizes, dim=-1)
        found = dict(zip(names[len(self._convolved) :], parts, strict=True))
        value, alpha = found.pop("v", None), found.pop("alpha", None)
        return _Projected(convolved, value, alpha, **found)

    @property
    def _convolved_width(self) -> int:
        """W, the features that the convolution reads on this rank."""
        return sum(len(getattr(self, f"{name}_weight")) for name in self._convolved)

    def _inputs(
        self, projected: _Projected, *, edges: tuple[Tensor, ...] | None = None, tail: Tensor | None = None
    ) -> dict[str, Any]:
        """Tensors q, k, v, alpha and the gates as the operation takes them."""
        head_dim, slots = self.config.head_dim, self.options.slots
        mixed, more = self._mixed(projected, edges, tail)
        query_key = l2_normalise(mixed.unflatten(-1, (-1, head_dim)))
        q, k = query_key.chunk(2, dim=-2)
        v = more["v"].unflatten(-1, (-1, head_dim))
        alpha = more["alpha"].unflatten(-1, (-1, slots)) if "alpha" in more else v
        if self.options.value_norm == "l2":
            v = l2_normalise(v)
        if self.options.alpha_norm == "rms":
            alpha = rms_normalise(alpha, eps=self.config.norm_eps)
        elif self.options.alpha_norm == "l2":
            alpha = l2_normalise(alpha)
        return {"q": q, "k": k, "v": v, "alpha": alpha, **self._gates(projected)}

    def _mixed(
        self, projected: _Projected, edges: tuple[Tensor, ...] | None, tail: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """q and k [B, T, 2F] behind the convolution, and v and alpha, behind it or as they were projected."""
        mixed = projected.convolved
        if self.options.conv_kernel > 0:
            weights = [getattr(self, f"{name}_conv_weight") for name in self._convolved]
            mixed = self.convolution(mixed, torch.cat(weights), edges=edges, tail=tail)
        if self.options.conv_activation == "silu":
            mixed = F.silu(mixed)
        more = {"v": projected.value, "alpha": projected.alpha}
        missing = [name for name in self._convolved if name in more]
        widths = [len(getattr(self, f"{name}_weight")) for name in missing]
        mixed, *parts = mixed.split([2 * len(self.q_weight), *widths], dim=-1)
        found = {name: x for name, x in more.items() if x is not None}
        return mixed, found | dict(zip(missing, parts, strict=True))

    def _gates(self, projected: _Projected) -> dict[str, Tensor]:
        """log beta and gamma [B, T, H] of the key pass and, where they are its own, of the value pass."""
        step = self._step_size(projected.step, self.step_bias)
        if projected.decay is None:
            decay = torch.full_like(step, self._fixed_log_decay())
        else:
            decay = self._log_decay(projected.decay, "")
        gates = {"log_decay": decay, "step_size": step}
        if projected.value_step is not None:
            gates["value_step_size"] = self._step_size(projected.value_step, self.value_step_bias)
        if projected.value_decay is not None:
            gates["value_log_decay"] = self._log_decay(projected.value_decay, "value_")
        return gates

    def _log_decay(self, logits: Tensor, prefix: str) -> Tensor:
        """log beta [B, T, H] of a learned forget gate, in fp32 (fp64 for fp64 inputs)."""
        logits = _wide(logits) + _wide(getattr(self, f"{prefix}decay_bias"))
        if self._as_rate(prefix):
            return -_wide(getattr(self, f"{prefix}decay_rate")).exp() * F.softplus(logits)
        floor = self.options.gate_floor
        if floor == 0:
            return F.logsigmoid(logits)
        return torch.logaddexp(F.logsigmoid(logits) + math.log1p(-floor), logits.new_tensor(math.log(floor)))

    def _fixed_log_decay(self) -> float:
        """log sigmoid(gate_bias), or 0 when the gate is off."""
        bias = self.options.gate_bias
        return min(bias, 0.0) - math.log1p(math.exp(-abs(bias))) if self.gate == "fixed" else 0.0

    def _step_size(self, logits: Tensor, bias: Tensor) -> Tensor:
        """gamma [B, T, H] in fp32 (fp64 for fp64 inputs)."""
        return torch.sigmoid(_wide(logits) + _wide(bias)) * self.options.largest_step

    def _settings(self) -> dict[str, Any]:
        """What the operation takes besides tokens and states."""
        names = ("chunk_size", "phi", "readout", "update")
        settings = {name: getattr(self.options, name) for name in names}
        if self.options.learns_affine:
            for name in ("readout_weight", "readout_bias"):
                settings[name] = getattr(self, name).unflatten(0, (-1, self.options.slots))
        return settings

    def _output(self, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Skip, per-head RMSNorm, GELU gate and output projection: y, v [B, T, H, V] -> [B, T, dim]."""
        if self.options.skip_values:
            y = y + (_wide(self.skip)[:, None] * v).to(y.dtype)
        eps = self.options.head_norm_eps or self.config.norm_eps
        normed = rms_normalise(y, eps=eps, weight=self.norm_weight)
        return self.row(normed.flatten(-2) * F.gelu(gate), self.out_weight)

    def _first_memory(self, documents: int) -> CompressState:
        """Both memories [documents, H, M, .] before the first token."""
        if self.options.learned_initial_memory:
            pair = (self.initial_key_memory, self.initial_value_memory)
            key, value = (_wide(memory).expand(documents, -1, -1, -1) for memory in pair)
            return CompressState(key_memory=key, value_memory=value)
        heads = len(self.step_weight)
        shape = (documents, heads, self.options.slots, self.config.head_dim)
        zeros = torch.zeros(shape, dtype=_wide_dtype(self.q_weight), device=self.q_weight.device)
        return CompressState(key_memory=zeros, value_memory=zeros)

    def _advance(self, state: TrellisState, memory: CompressState, convolved: Tensor) -> TrellisState:
        """The state after the tokens whose inputs of the convolution are ``convolved`` [B, T, W]."""
        if state.tail is None:
            return replace(state, memory=memory)
        return TrellisState(memory=memory, tail=last_inputs(state.tail, convolved))


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or fp64 when it is fp64: gates and memories never live in half precision."""
    return x.to(_wide_dtype(x))
