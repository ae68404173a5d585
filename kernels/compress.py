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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.activations import PHI, READOUT
from kernels.chunkwise import chunkwise
from kernels.layout import PackedLayout
from kernels.reference import reference

__all__ = ["BACKENDS", "CompressState", "compress_kv"]

BACKENDS = ("auto", "reference", "chunkwise", "triton")


@dataclass(frozen=True, eq=False)
class CompressState:
    """What a sequence leaves behind; its size does not depend on the number of tokens.

    Attributes:
        key_memory: S after the last token [N, H, M, D].
        value_memory: R after the last token [N, H, M, V].
        key_chunk_start, value_chunk_start: the memories before the current chunk's first token, of the same
            shapes; needed where ``offset`` is not 0 and ignored where it is.
        offset: tokens of the current chunk already consumed, in [0, C); one for all documents, or one for
            each.
    """

    key_memory: Tensor
    value_memory: Tensor
    key_chunk_start: Tensor | None = None
    value_chunk_start: Tensor | None = None
    offset: int | tuple[int, ...] = 0

    @property
    def inside_chunk(self) -> bool:
        """Whether any document's next token is not the first of its chunk."""
        return bool(self.offset) if isinstance(self.offset, int) else any(self.offset)


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
    initial_state: CompressState | None = None,
    layout: PackedLayout | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
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
        readout: activation between the passes: ln_silu, l2_silu, softmax.
        initial_state: state to continue from, at any offset; None is zero memories.
        layout: chunk grid of packed documents (B = 1), built once and used by every layer.
        cu_seqlens: document bounds [N + 1] instead of ``layout``, where speed does not matter.
        output_final_state: also return each document's state.
        backend: "reference" (slow, the definition), "chunkwise" (PyTorch), "triton" (CUDA; not fp64), or
            "auto": triton where it can run, chunkwise elsewhere.

    Returns:
        y [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value; the message names it and the
        remedy.
    """
    operands = (q, k, v, alpha, log_decay, step_size)
    check_operands(operands, dims="B, T, H")
    check_choices(phi=phi, readout=readout, backend=backend)
    documents = _documents(q, layout, cu_seqlens)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in operands[:4]) else torch.float32
    state = zero_state(q, v, alpha, documents, dtype) if initial_state is None else initial_state
    check_state(state, q, v, alpha, documents)
    layout = _layout(q, chunk_size, state.offset, layout, cu_seqlens)
    initial = (state.key_memory.to(dtype), state.value_memory.to(dtype))
    with torch.autocast(device_type=q.device.type, enabled=False):
        run = _backend(backend, q.device, dtype)
        y, final, start = run(
            operands, initial, stale_pair(state, initial), layout=layout, phi=phi, readout=readout
        )
    if not output_final_state:
        return y, None
    ends = layout.end_offsets
    offset = ends[0] if len(set(ends)) == 1 else ends
    return y, CompressState(final[0], final[1], start[0], start[1], offset)


def zero_state(q: Tensor, v: Tensor, alpha: Tensor, documents: int, dtype: torch.dtype) -> CompressState:
    """Zero memories for ``documents`` documents of operands q, v, alpha [..., H, .]."""
    heads, slots = alpha.shape[-2:]
    return CompressState(
        torch.zeros(documents, heads, slots, q.shape[-1], dtype=dtype, device=q.device),
        torch.zeros(documents, heads, slots, v.shape[-1], dtype=dtype, device=q.device),
    )


def stale_pair(state: CompressState, memories: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The pair the next token's inner gradient is taken at, in the dtype of ``memories``; None: at those."""
    if not state.inside_chunk:
        return None
    assert state.key_chunk_start is not None, "checked by check_state"
    assert state.value_chunk_start is not None, "checked by check_state"
    key, value = state.key_chunk_start.to(memories[0]), state.value_chunk_start.to(memories[1])
    if isinstance(state.offset, int):
        return key, value
    inside = torch.tensor([o > 0 for o in state.offset], device=key.device).view(-1, 1, 1, 1)
    return torch.where(inside, key, memories[0]), torch.where(inside, value, memories[1])


_NAMES = ("q", "k", "v", "alpha", "log_decay", "step_size")


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    found = importlib.util.find_spec("triton") is not None
    if name == "auto":
        name = "triton" if found and device.type == "cuda" and dtype == torch.float32 else "chunkwise"
    if name != "triton":
        return {"chunkwise": chunkwise, "reference": reference}[name]
    if not found:
        raise ValueError("backend = 'triton', but triton is not installed: install it, or use 'chunkwise'")
    if dtype != torch.float32:
        raise ValueError("backend = 'triton' computes in fp32 and an operand is fp64: use 'chunkwise'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend = 'triton' with operands on {device}: move them to a GPU, or use 'chunkwise'"
        )
    from kernels.triton.compress import triton_compress

    return triton_compress


def check_operands(operands: tuple[Tensor, ...], *, dims: str) -> None:
    """Refuse operands whose shapes, dtypes, devices or (on CPU) gate values do not fit (ValueError).

    ``dims`` names the leading dimensions: "B, T, H" for sequences, "B, H" for single tokens.
    """
    named, rank = dict(zip(_NAMES, operands, strict=True)), dims.count(",") + 1
    q = named["q"]
    if q.dim() != rank + 1 or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}: it should be [{dims}, D], none of them 0")
    for name, x in named.items():
        gate = name in ("log_decay", "step_size")
        fits = x.shape[:rank] == q.shape[:rank] and x.dim() == rank + (not gate) and 0 not in x.shape
        if not fits or (name == "k" and x.shape != q.shape):
            width = {"k": f", {q.shape[-1]}", "v": ", V", "alpha": ", M"}.get(name, "")
            wanted = ", ".join(map(str, q.shape[:rank])) + width
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: beside q {tuple(q.shape)} it should be [{wanted}]"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: it should be a floating point type")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    if q.device.type == "cpu":
        _check_gates(named["log_decay"], named["step_size"])


def _check_gates(log_decay: Tensor, step_size: Tensor) -> None:
    """Reads values, so only on CPU: on a GPU it would wait for them."""
    if not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay reaches {log_decay.max().item():g}: it should be <= 0 everywhere")
    if not bool((step_size >= 0).all()):
        raise ValueError(f"step_size reaches {step_size.min().item():g}: it should be >= 0 everywhere")


def check_choices(*, phi: str, readout: str, backend: str = "auto") -> None:
    """Refuse an unknown name (ValueError)."""
    for name, value, allowed in (
        ("phi", phi, PHI),
        ("readout", readout, READOUT),
        ("backend", backend, BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}: use one of {', '.join(allowed)}")


def _documents(q: Tensor, layout: PackedLayout | None, cu_seqlens: Tensor | None) -> int:
    if layout is not None and cu_seqlens is not None:
        raise ValueError(
            "layout and cu_seqlens are both given: give one (a layout is checked once, for all layers)"
        )
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens with B = {q.shape[0]}: packed documents lie end to end in one row, B = 1"
        )
    if layout is not None:
        return layout.num_documents
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _layout(
    q: Tensor,
    chunk_size: int,
    offset: int | tuple[int, ...],
    layout: PackedLayout | None,
    cu_seqlens: Tensor | None,
) -> PackedLayout:
    """The grid of this call, checked against the operands."""
    if layout is None and cu_seqlens is None:
        return _uniform(q.shape[0], q.shape[1], chunk_size, offset, q.device)
    if layout is None:
        assert cu_seqlens is not None, "one of the two is given here"
        layout = PackedLayout.from_cu_seqlens(cu_seqlens, chunk_size, offsets=offset)
    offsets = (offset,) * layout.num_documents if isinstance(offset, int) else offset
    if layout.chunk_size != chunk_size:
        raise ValueError(
            f"layout has chunk_size {layout.chunk_size}, the call {chunk_size}: build it with the call's"
        )
    if layout.offsets != offsets:
        raise ValueError(
            f"layout is built for offset {layout.offsets}, initial_state has {offsets}: build it with those"
        )
    tokens = q.shape[0] * q.shape[1]
    if layout.num_tokens != tokens:
        name = "cu_seqlens" if cu_seqlens is not None else "layout"
        raise ValueError(
            f"{name} counts {layout.num_tokens} tokens, the operands {tokens}: they should agree"
        )
    return layout.to(q.device)


@functools.lru_cache(maxsize=64)
def _uniform(
    batch: int, length: int, chunk_size: int, offset: int | tuple[int, ...], device: torch.device
) -> PackedLayout:
    return PackedLayout.uniform(batch, length, chunk_size, offset=offset).to(device)


def check_state(state: CompressState, q: Tensor, v: Tensor, alpha: Tensor, documents: int) -> None:
    """Refuse a state that does not fit operands q, v, alpha [..., H, .] (ValueError)."""
    heads, slots = alpha.shape[-2:]
    wanted = {
        "key_memory": (documents, heads, slots, q.shape[-1]),
        "value_memory": (documents, heads, slots, v.shape[-1]),
    }
    wanted |= {f"{name.split('_')[0]}_chunk_start": shape for name, shape in wanted.items()}
    for name, shape in wanted.items():
        x = getattr(state, name)
        if x is None:
            if state.inside_chunk:
                raise ValueError(
                    f"initial_state.{name} is None at offset {state.offset}: carry the chunk-start pair along"
                )
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"initial_state.{name} has shape {tuple(x.shape)}: it should be {shape}")
        if x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"initial_state.{name} is {x.dtype} on {x.device}: it should be floating point on {q.device}"
            )
