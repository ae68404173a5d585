"""What the public calls refuse, each with a ValueError that names the argument and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.activations import PHI, READOUT, UPDATE
from kernels.layout import PackedLayout, check_rows
from kernels.types import CompressState, Operands, Rule

__all__ = ["BACKENDS", "check_choices", "check_grid", "check_operands", "check_state"]

BACKENDS = ("auto", "reference", "chunkwise", "triton")

_GATES = ("log_decay", "step_size", "value_log_decay", "value_step_size")
_AFFINE = ("readout_weight", "readout_bias")


def check_operands(operands: Operands, *, dims: str, check_values: bool | None = None) -> None:
    """Refuse operands whose shapes, dtypes, devices or, where ``compress_kv`` reads them, gates do not fit.

    ``dims`` names the leading dimensions: "B, T, H" for sequences, "B, H" for single tokens.
    """
    q, rank = operands.q, dims.count(",") + 1
    for name, x in zip(Operands._fields, operands, strict=True):
        if not isinstance(x, Tensor) and (x is not None or name not in Operands._field_defaults):
            raise ValueError(f"{name} is {_said(x)}: it should be a tensor")
    if q.dim() != rank + 1 or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}: it should be [{dims}, D], none of them 0")
    for name, x in zip(Operands._fields, operands, strict=True):
        if x is None:
            continue
        _check_shape(name, x, operands, rank)
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}: it should be a floating point type")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    if torch.compiler.is_compiling():
        return
    if check_values or (check_values is None and q.device.type == "cpu"):
        _check_gates(operands)


def _said(x: object) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"


def _check_shape(name: str, x: Tensor, operands: Operands, rank: int) -> None:
    q = operands.q
    if name in _AFFINE:
        wanted = (q.shape[-2], operands.alpha.shape[-1])
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it should be [H, M] = {list(wanted)}")
        return
    fits = x.shape[:rank] == q.shape[:rank] and x.dim() == rank + (name not in _GATES) and 0 not in x.shape
    if not fits or (name == "k" and x.shape != q.shape):
        width = {"k": f", {q.shape[-1]}", "v": ", V", "alpha": ", M"}.get(name, "")
        expected = ", ".join(map(str, q.shape[:rank])) + width
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: beside q {tuple(q.shape)} it should be [{expected}]"
        )


def _check_gates(operands: Operands) -> None:
    """Reads values: on a GPU it waits for them."""
    for name in _GATES:
        x = getattr(operands, name)
        if x is None:
            continue
        low, high = (
            end.item() for end in torch.aminmax(x.detach())
        )  # a NaN is both, and is neither <= nor >=
        if "decay" in name and not (high <= 0 and low > -torch.inf):
            bad = high if low > -torch.inf else low
            raise ValueError(f"{name} reaches {bad:g}: it should be finite and <= 0 everywhere")
        if "step" in name and not (low >= 0 and high < torch.inf):
            bad = low if high < torch.inf else high
            raise ValueError(f"{name} reaches {bad:g}: it should be finite and >= 0 everywhere")


def check_choices(rule: Rule, backend: str = "auto", backends: Sequence[str] = BACKENDS) -> None:
    """Refuse an unknown name (ValueError)."""
    for name, value, allowed in (
        ("phi", rule.phi, PHI),
        ("readout", rule.readout, READOUT),
        ("update", rule.update, UPDATE),
        ("backend", backend, backends),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}: use one of {', '.join(allowed)}")


def check_grid(
    operands: Operands, chunk_size: int, offset: int | tuple[int, ...], layout: PackedLayout | None
) -> list[int]:
    """Offsets of the documents, or one for all; the chunk grid is checked against the operands.

    In compiled graphs, which would be bound to the documents' number and lengths, those are left to the
    operator.
    """
    batch, length = operands.q.shape[:2]
    offsets = [offset] if isinstance(offset, int) else list(offset)
    if layout is not None and layout.chunk_size != chunk_size:
        raise ValueError(
            f"layout has chunk_size {layout.chunk_size}, the call {chunk_size}: build it with the call's"
        )
    if torch.compiler.is_compiling():
        return offsets
    if layout is None:
        check_rows(batch, length, chunk_size, offset)
        return offsets
    wanted = (offset,) * layout.num_documents if isinstance(offset, int) else offset
    if layout.offsets != wanted:
        raise ValueError(
            f"layout is built for offset {layout.offsets}, initial_state has {wanted}: build it with those"
        )
    if layout.num_tokens != batch * length:
        raise ValueError(
            f"layout counts {layout.num_tokens} tokens, the operands {batch * length}: they should agree"
        )
    if batch > 1 and layout.lengths != (length,) * batch:
        raise ValueError(
            f"layout holds {layout.num_documents} documents, the operands B = {batch} rows of {length}: "
            "packed documents lie end to end in one row, B = 1"
        )
    return offsets


def check_state(state: CompressState, q: Tensor, v: Tensor, alpha: Tensor, documents: int) -> None:
    """Refuse a state that does not fit operands q, v, alpha [..., H, .] (ValueError)."""
    if not isinstance(state, CompressState):
        raise ValueError(f"the state is {_said(state)}: it should be a CompressState")
    if not isinstance(state.offset, int | tuple):
        raise ValueError(
            f"initial_state.offset is {_said(state.offset)}: it should be an int or a tuple of one each"
        )
    heads, slots = alpha.shape[-2:]
    wanted = {
        "key_memory": (documents, heads, slots, q.shape[-1]),
        "value_memory": (documents, heads, slots, v.shape[-1]),
    }
    wanted |= {f"{name.split('_')[0]}_chunk_start": shape for name, shape in wanted.items()}
    for name, shape in wanted.items():
        x = getattr(state, name)
        if x is None and name.endswith("memory"):
            raise ValueError(f"initial_state.{name} is None: it should be a tensor of shape {shape}")
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
