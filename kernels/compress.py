"""compress_kv: keys and values compressed into two memories of M slots, read by queries (arXiv 2512.23852).

Per head, in tokens (kernels.reference has the definition, kernels.stages the chunkwise form):

    S_t = beta_t S_{t-1} - gamma_t u_t k_t^T      u_t: gradient of |phi(S k_t) - alpha_t|^2 / 2 in S k_t,
    R_t = beta_t R_{t-1} - gamma_t w_t v_t^T      taken at the chunk's start; w_t: the same for (R, v_t)
    y_t = R_t^T f(S_t q_t)

Shapes: q, k [B, T, H, D]; v and y [B, T, H, V]; alpha [B, T, H, M]; log_decay = log beta and
step_size = gamma [B, T, H]; memories [N, H, M, .] with N documents (N = B unless packed). Memories and gates
are fp32 (fp64 for fp64 inputs) whatever the inputs are.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kernels import stages
from kernels.activations import ELEMENTWISE_PHI
from kernels.checks import check_choices, check_grid, check_operands, check_state
from kernels.layout import PackedLayout, check_chunk_size
from kernels.operator import compress, find_layout, full_precision
from kernels.reference import reference
from kernels.types import CompressState, Memories, Operands, Rule

__all__ = [
    "Call",
    "checked_call",
    "choose_backend",
    "compress_kv",
    "run_call",
    "stages_for",
    "stale_pair",
    "zero_state",
]


def compress_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    *,
    chunk_size: int,
    phi: str = "silu",
    readout: str = "ln_silu",
    update: str = "stale",
    value_log_decay: Tensor | None = None,
    value_step_size: Tensor | None = None,
    readout_weight: Tensor | None = None,
    readout_bias: Tensor | None = None,
    initial_state: CompressState | None = None,
    layout: PackedLayout | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    check_values: bool | None = None,
) -> tuple[Tensor, CompressState | None]:
    """Compress keys and values into the memories and read them with queries; differentiable in every tensor.

    Args:
        q, k: queries and keys [B, T, H, D].
        v: values [B, T, H, V].
        alpha: latent targets [B, T, H, M].
        log_decay: log of the forget gate, <= 0 [B, T, H].
        step_size: inner step size, >= 0 [B, T, H].
        chunk_size: C; part of the function, not a tuning knob.
        phi: inner nonlinearity: silu, tanh, identity, ln_silu, softmax.
        readout: activation f between the passes: ln_silu, l2_silu, softmax, silu, silu_rms.
        update: "stale" takes inner gradients at the chunk's start (the paper); "corrected" adds what the
            chunk has written since (docs/math.md).
        value_log_decay, value_step_size: gates of the value pass [B, T, H]; None shares the key pass's.
        readout_weight, readout_bias: affine after f, in silu and silu_rms inside it [H, M]; None is 1 and 0.
        initial_state: state to continue from, at any offset; None is zero memories.
        layout: chunk grid of packed documents (B = 1), built once and used by every layer.
        cu_seqlens: document bounds [N + 1] instead of ``layout``, where speed does not matter (on a GPU they
            are waited for, and torch.compile cannot capture it).
        output_final_state: also return each document's state.
        backend: "reference" (slow, the definition), "chunkwise" (PyTorch), "triton" (CUDA; not fp64, and
            "corrected" for elementwise phi only), or "auto": triton where it can run, chunkwise elsewhere.
        check_values: whether to refuse gates out of range; None does on a CPU and not on a GPU, where it
            would wait for them. Not done inside torch.compile.

    Returns:
        y [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; the message names it and the
        remedy.
    """
    gates = (log_decay, step_size, value_log_decay, value_step_size)
    call = checked_call(
        Operands(q, k, v, alpha, *gates, readout_weight, readout_bias),
        Rule(phi, readout, update),
        chunk_size=chunk_size,
        state=initial_state,
        layout=layout,
        cu_seqlens=cu_seqlens,
        backend=backend,
        check_values=check_values,
    )
    y, final, start = run_call(call)
    return y, call.state_after(final, start) if output_final_state else None


@dataclass(frozen=True)
class Call:
    """The arguments of one call, which were checked.

    Attributes:
        operands, rule, chunk_size: the function and what it is taken of.
        state: entered with, of the operands' shapes.
        layout: of packed documents; None for rows of equal length.
        offsets: of the documents, or one for all.
        backend: that will run.
    """

    operands: Operands
    rule: Rule
    chunk_size: int
    state: CompressState
    layout: PackedLayout | None
    offsets: list[int]
    backend: str

    @property
    def initial(self) -> Memories:
        """The memories entered with, in the compute type."""
        dtype = self.operands.compute_dtype
        return Memories(self.state.key_memory.to(dtype), self.state.value_memory.to(dtype))

    def state_after(self, final: Memories, start: Memories) -> CompressState:
        """The state of these memories and chunk-start pair after the last token."""
        length = self.operands.q.shape[1]
        offset = _end_offset(length, self.chunk_size, self.state.offset, self.layout)
        return CompressState(final.key, final.value, start.key, start.value, offset)


def checked_call(
    operands: Operands,
    rule: Rule,
    *,
    chunk_size: int,
    state: CompressState | None,
    layout: PackedLayout | None,
    cu_seqlens: Tensor | None,
    backend: str,
    check_values: bool | None,
) -> Call:
    """What ``compress_kv`` was given, checked (ValueError as there) and completed."""
    check_operands(operands, dims="B, T, H", check_values=check_values)
    check_choices(rule, backend)
    check_chunk_size(chunk_size)
    backend = choose_backend(backend, operands.q.device, operands.compute_dtype, rule)
    if cu_seqlens is not None:
        layout = _from_cu_seqlens(operands, layout, cu_seqlens, chunk_size, state)
    state = _entering_state(operands, layout, state)
    offsets = check_grid(operands, chunk_size, state.offset, layout)
    return Call(operands, rule, chunk_size, state, layout, offsets, backend)


def _entering_state(
    operands: Operands, layout: PackedLayout | None, state: CompressState | None
) -> CompressState:
    """The given state, checked against the operands, or zero memories."""
    if layout is not None and not isinstance(layout, PackedLayout):
        raise ValueError(f"layout is of type {type(layout).__name__}: it should be a PackedLayout")
    q, v, alpha = operands.q, operands.v, operands.alpha
    documents = q.shape[0] if layout is None else layout.bounds.shape[0] - 1
    state = zero_state(q, v, alpha, documents, operands.compute_dtype) if state is None else state
    check_state(state, q, v, alpha, documents)
    return state


def run_call(call: Call) -> tuple[Tensor, Memories, Memories]:
    """Output, final memories and final chunk-start pair on a backend that can run."""
    operands, initial, rule = call.operands, call.initial, call.rule
    stale = stale_pair(call.state, initial)
    bounds = None if call.layout is None else call.layout.bounds
    if call.backend == "reference":
        grid = find_layout(operands, bounds, call.offsets, call.chunk_size)
        with full_precision(operands.q):
            return reference(operands, initial, stale, layout=grid, rule=rule)
    return compress(
        operands,
        initial,
        stale,
        bounds=bounds,
        offsets=call.offsets,
        chunk_size=call.chunk_size,
        rule=rule,
        backend=call.backend,
    )


def stages_for(operands: Operands, rule: Rule) -> ModuleType:
    """The stages that "auto" runs: the module ``kernels.stages`` or its Triton form, with the same functions.

    For compositions across devices; raises nothing.
    """
    if choose_backend("auto", operands.q.device, operands.compute_dtype, rule) == "chunkwise":
        return stages
    import kernels.triton.stages

    return kernels.triton.stages


def zero_state(q: Tensor, v: Tensor, alpha: Tensor, documents: int, dtype: torch.dtype) -> CompressState:
    """Zero memories for ``documents`` documents of operands q, v, alpha [..., H, .]."""
    heads, slots = alpha.shape[-2:]
    return CompressState(
        torch.zeros(documents, heads, slots, q.shape[-1], dtype=dtype, device=q.device),
        torch.zeros(documents, heads, slots, v.shape[-1], dtype=dtype, device=q.device),
    )


def stale_pair(state: CompressState, memories: Memories) -> Memories | None:
    """The pair the next token's inner gradient is taken at, in the dtype of ``memories``; None: at those."""
    if not state.inside_chunk:
        return None
    assert state.key_chunk_start is not None, "checked by check_state"
    assert state.value_chunk_start is not None, "checked by check_state"
    key, value = state.key_chunk_start.to(memories.key), state.value_chunk_start.to(memories.value)
    if isinstance(state.offset, int) or all(state.offset):
        return Memories(key, value)
    inside = _inside_chunk(tuple(offset > 0 for offset in state.offset), key.device)
    return Memories(torch.where(inside, key, memories.key), torch.where(inside, value, memories.value))


@functools.lru_cache(maxsize=16)
def _inside_chunk(documents: tuple[bool, ...], device: torch.device) -> Tensor:
    """[N, 1, 1, 1], made once for all layers: a GPU waits for the copy."""
    with torch.inference_mode(False):  # whoever asks first does so for everybody
        return torch.tensor(documents, device=device).view(-1, 1, 1, 1)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, rule: Rule) -> str:
    """The backend that will run; refuses one that cannot (ValueError)."""
    if name in ("reference", "chunkwise"):
        return name
    found = importlib.util.find_spec("triton") is not None
    covered = not rule.corrected or rule.phi in ELEMENTWISE_PHI
    if name == "auto":
        usable = found and covered and device.type == "cuda" and dtype == torch.float32
        return "triton" if usable else "chunkwise"
    if not found:
        raise ValueError("backend = 'triton', but triton is not installed: install it, or use 'chunkwise'")
    if dtype != torch.float32:
        raise ValueError("backend = 'triton' computes in fp32 and an operand is fp64: use 'chunkwise'")
    if not covered:
        raise ValueError(
            f"backend = 'triton' with update = 'corrected' and phi = {rule.phi!r}: "
            f"use 'chunkwise', or phi one of {', '.join(ELEMENTWISE_PHI)}"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend = 'triton' with operands on {device}: move them to a GPU, or use 'chunkwise'"
        )
    return name


def _from_cu_seqlens(
    operands: Operands,
    layout: PackedLayout | None,
    cu_seqlens: Tensor,
    chunk_size: int,
    state: CompressState | None,
) -> PackedLayout:
    if layout is not None:
        raise ValueError(
            "layout and cu_seqlens are both given: give one (a layout is checked once, for all layers)"
        )
    batch, length = operands.q.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seqlens with B = {batch}: packed documents lie end to end in one row, B = 1")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is of type {type(cu_seqlens).__name__}: it should be an integer tensor")
    offsets = 0 if state is None else state.offset
    layout = PackedLayout.from_cu_seqlens(cu_seqlens.cpu(), chunk_size, offsets=offsets)
    if layout.num_tokens != length:
        raise ValueError(
            f"cu_seqlens counts {layout.num_tokens} tokens, the operands {length}: they should agree"
        )
    return layout


def _end_offset(
    length: int, chunk_size: int, offset: int | tuple[int, ...], layout: PackedLayout | None
) -> int | tuple[int, ...]:
    """Offset after the last token; one number where all documents share it."""
    if layout is None and isinstance(offset, int):
        return (offset + length) % chunk_size
    if layout is None:
        assert not isinstance(offset, int), "the other case is above"
        ends = tuple((o + length) % chunk_size for o in offset)
    else:
        ends = layout.end_offsets
    return ends[0] if len(set(ends)) == 1 else ends
