"""Prefill and decode_step: a prompt at once, then token by token; a step's time and memory never grow.

With the state (S, R), the chunk-start pair (S', R') and o tokens of the current chunk consumed, one step is

    S', R' = S, R where o = 0
    stale        z = S' k;        u = J_phi(z)^T (phi(z) - alpha)
    corrected    S' = beta S';    z = S' k;    u = J_phi(z)^T (phi(z) - alpha) + beta S k - z
    S = beta S - gamma u k^T      (R, w, v and the value pass's gates alike)
    y = R^T f(S q);   o = (o + 1) mod C

Shapes: q, k [B, H, D]; v, y [B, H, V]; alpha [B, H, M]; gates [B, H]; readout affine [H, M]; memories
[B, H, M, .].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import apply_readout, inner_backward, inner_gradient
from kernels.checks import check_choices, check_operands, check_state
from kernels.compress import Call, checked_call, choose_backend, run_call, stale_pair
from kernels.layout import PackedLayout, check_chunk_size
from kernels.operator import full_precision
from kernels.parts import read_parts
from kernels.types import CompressState, Memories, Operands, Rule

__all__ = ["decode_step", "prefill"]

_STEP_BACKENDS = ("auto", "chunkwise", "triton")


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    state: CompressState | None = None,
    *,
    chunk_size: int,
    phi: str = "silu",
    readout: str = "ln_silu",
    update: str = "stale",
    value_log_decay: Tensor | None = None,
    value_step_size: Tensor | None = None,
    readout_weight: Tensor | None = None,
    readout_bias: Tensor | None = None,
    layout: PackedLayout | None = None,
    pads: Sequence[int] | None = None,
    output_final_state: bool = True,
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, CompressState | None]:
    """Consume a prompt of any length in the parallel form, without keeping anything for a backward pass.

    On a CPU what begins or ends inside a chunk takes the time of its own tokens (kernels.parts), so a few
    tokens after a long prompt are cheap.

    Args:
        q, k, v, alpha, log_decay, step_size: operands [B, T, H, .] as in ``compress_kv``.
        state: of the tokens before, at any offset; None starts with zero memories.
        pads: how many tokens at the front of each row are none, [B] numbers in [0, T], so that rows of
            unequal length end together: finite numbers, and what y holds there means nothing. Not with a
            ``layout``.
        output_final_state: whether a state is returned: on a CPU it is not made where it is not.
        others: as in ``compress_kv``.

    Returns:
        y [B, T, H, V] in v's dtype, and the state that ``decode_step`` or another prefill continues, or None.

    Raises:
        ValueError: as in ``compress_kv``.
    """
    gates = (log_decay, step_size, value_log_decay, value_step_size)
    operands = Operands(q, k, v, alpha, *gates, readout_weight, readout_bias)
    with torch.no_grad(), full_precision(q):
        state = state.detach() if isinstance(state, CompressState) else state
        call = checked_call(
            operands,
            Rule(phi, readout, update),
            chunk_size=chunk_size,
            state=state,
            layout=layout,
            cu_seqlens=None,
            backend=backend,
            check_values=check_values,
        )
        _check_pads(pads, call)
        plain = layout is not None or torch.compiler.is_compiling() or call.backend != "chunkwise"
        if plain and pads is None:
            y, final, start = run_call(call)
        else:
            y, final, start = read_parts(call, pads, last=output_final_state)
        if not output_final_state:
            return y, None
        state = call.state_after(final, start)
        return y, state if pads is None else replace(state, offset=_offsets_behind(call, pads))


def _offsets_behind(call: Call, pads: Sequence[int]) -> int | tuple[int, ...]:
    """Offset after the last token, of every row where they differ."""
    offsets = call.offsets * len(pads) if len(call.offsets) == 1 else call.offsets
    length, size = call.operands.q.shape[1], call.chunk_size
    after = tuple((offset + length - pad) % size for offset, pad in zip(offsets, pads, strict=True))
    return after[0] if len(set(after)) == 1 else after


def _check_pads(pads: Sequence[int] | None, call: Call) -> None:
    if pads is None:
        return
    batch, length = call.operands.q.shape[:2]
    if call.layout is not None:
        raise ValueError("pads and a layout are both given: packed documents have no pads")
    if call.backend == "reference":
        raise ValueError("pads with backend = 'reference': use 'chunkwise'")
    if len(pads) != batch or not all(0 <= pad <= length for pad in pads):
        raise ValueError(f"pads = {list(pads)}: give each of the {batch} rows a number in [0, {length}]")


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    state: CompressState,
    *,
    chunk_size: int,
    phi: str = "silu",
    readout: str = "ln_silu",
    update: str = "stale",
    value_log_decay: Tensor | None = None,
    value_step_size: Tensor | None = None,
    readout_weight: Tensor | None = None,
    readout_bias: Tensor | None = None,
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, CompressState]:
    """Consume one token of every sequence.

    Args:
        q, k, v, alpha, log_decay, step_size, value_log_decay, value_step_size: operands of the token, without
            the T dimension of ``compress_kv``.
        state: of the tokens before; the step leaves it untouched.
        chunk_size, phi, readout, update, readout_weight, readout_bias, check_values: as in ``compress_kv``.
        backend: "chunkwise" (PyTorch, differentiable), "triton" (one kernel, without gradients) or "auto":
            triton where it can run and no gradient is asked for.

    Returns:
        y [B, H, V] in v's dtype, and the state after the token.

    Raises:
        ValueError: as in ``compress_kv``.
    """
    gates = (log_decay, step_size, value_log_decay, value_step_size)
    operands = Operands(q, k, v, alpha, *gates, readout_weight, readout_bias)
    rule = Rule(phi, readout, update)
    check_operands(operands, dims="B, H", check_values=check_values)
    check_choices(rule, backend, _STEP_BACKENDS)
    check_chunk_size(chunk_size)
    check_state(state, q, v, alpha, q.shape[0])
    _check_offset(state, chunk_size, q.shape[0])
    dtype = operands.compute_dtype
    memories = Memories(state.key_memory.to(dtype), state.value_memory.to(dtype))
    start = stale_pair(state, memories) or memories
    if _on_triton(operands, memories, start, backend, rule):
        from kernels.triton.decode import triton_decode

        tensors = (memories.key, memories.value, start.key, start.value)
        y, after = triton_decode(
            operands, tensors, _offset(state, q.device), chunk_size=chunk_size, rule=rule
        )
        memories, start = Memories(*after[:2]), Memories(*after[2:])
    else:
        with full_precision(q):
            y, memories, start = _step(operands, memories, start, rule)
    return y, _advance(state, memories, start, chunk_size)


def _check_offset(state: CompressState, chunk_size: int, batch: int) -> None:
    offsets = (state.offset,) if isinstance(state.offset, int) else state.offset
    if any(not 0 <= o < chunk_size for o in offsets):
        raise ValueError(
            f"state.offset = {state.offset}: it counts tokens of a chunk, so it is in [0, {chunk_size})"
        )
    if not isinstance(state.offset, int) and len(offsets) != batch:
        raise ValueError(f"state.offset has {len(offsets)} entries for {batch} sequences: give one each")


def _on_triton(operands: Operands, memories: Memories, start: Memories, backend: str, rule: Rule) -> bool:
    tensors = (*operands, memories.key, memories.value, start.key, start.value)
    tracked = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if backend == "triton" and tracked:
        raise ValueError("backend = 'triton' decodes without gradients: call it under torch.no_grad()")
    if backend == "auto" and tracked:
        return False
    # One program holds all slots of a head, so "corrected" is no different for a row-wise phi.
    plain = Rule(phi=rule.phi, readout=rule.readout)
    return choose_backend(backend, operands.q.device, memories.key.dtype, plain) == "triton"


def _step(x: Operands, memory: Memories, start: Memories, rule: Rule) -> tuple[Tensor, Memories, Memories]:
    """y [B, H, V], the memories, and the chunk-start pair as it stands inside the chunk."""
    dtype = memory.key.dtype
    q, k, v, alpha, decay, step = (t.to(dtype) for t in x[:6] if t is not None)
    value_decay = decay if x.value_log_decay is None else x.value_log_decay.to(dtype)
    value_step = step if x.value_step_size is None else x.value_step_size.to(dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in x[8:])
    S, S_start = _write(memory.key, start.key, (k, alpha, decay, step), rule)
    R, R_start = _write(memory.value, start.value, (v, alpha, value_decay, value_step), rule)
    p = apply_readout(_apply(S, q), rule.readout, weight, bias)
    return _apply(R.mT, p).to(x.v.dtype), Memories(S, R), Memories(S_start, R_start)


def _write(memory: Tensor, start: Tensor, token: tuple[Tensor, ...], rule: Rule) -> tuple[Tensor, Tensor]:
    """One memory [B, H, M, F] after the token (x, alpha, log beta, gamma), and its chunk start."""
    x, alpha, decay, step = token
    beta = decay.exp()[..., None, None]
    kept = beta * memory
    if rule.corrected:
        start = beta * start
    z = _apply(start, x)
    u: Tensor = _InnerGradient.apply(z, alpha, rule.phi)  # type: ignore[no-untyped-call]
    if rule.corrected:
        u = u + _apply(kept, x) - z
    return kept - (step[..., None] * u)[..., :, None] * x[..., None, :], start


class _InnerGradient(torch.autograd.Function):
    """u of (z, alpha); aten's fused formulas have no derivative of their own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: Tensor, phi: str) -> Tensor:
        ctx.phi = phi
        ctx.save_for_backward(z, alpha)
        return inner_gradient(z, alpha, phi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, alpha = ctx.saved_tensors
        dz, dalpha = torch.empty_like(z), torch.empty_like(z)
        inner_backward(z, alpha, grad, ctx.phi, out=(dz, dalpha))
        return dz, dalpha, None


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [B, H, i, j] times x [B, H, j]."""
    return (matrix @ x[..., None]).squeeze(-1)


def _offset(state: CompressState, device: torch.device) -> int | Tensor:
    return state.offset if isinstance(state.offset, int) else torch.tensor(state.offset, device=device)


def _advance(state: CompressState, memories: Memories, start: Memories, chunk_size: int) -> CompressState:
    offset: int | tuple[int, ...]
    if isinstance(state.offset, int):
        offset = (state.offset + 1) % chunk_size
        start = start if offset else memories
    else:
        offset = tuple((o + 1) % chunk_size for o in state.offset)
    return CompressState(memories.key, memories.value, start.key, start.value, offset)
