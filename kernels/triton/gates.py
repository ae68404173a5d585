# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gates at both ends of a call: token order to cumulative log decay, and gradients back to token order.

Shapes: gates [B, T, H] in token order; chunk order [S, P, H, C] in fp32, where S = 1 set serves both
memories, or S = 2 (0 the key memory's, 1 the value memory's) where the value pass has a gate of its own. P
chunks, H heads, C tokens of a chunk, n <= C of them real.

    forward    l_j = sum_{i <= j} log beta_i for j < n, and l_{n-1} from there on;   gamma_j = 0 for j >= n
    backward   dl_j = rows_j - gamma_j dgamma_j, and at the chunk's last token + end;
               dlogbeta_j = sum_{i >= j} dl_i

A long chunk is summed in blocks of at most BLOCK tokens; a block begins with the last sum of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layout import PackedLayout
from kernels.types import Operands

__all__ = ["Gates", "derive_gates", "gate_gradients"]

BLOCK = 64
HEADS = 16


@dataclass(frozen=True)
class Gates:
    """Gates of every slot in chunk order, fp32 [S, P, H, C].

    Attributes:
        log_decay: l, cumulative inside the chunk; flat over pads.
        step: gamma, 0 on pads.
    """

    log_decay: Tensor
    step: Tensor

    @property
    def own(self) -> bool:
        """Whether the value memory has a set of its own (S = 2)."""
        return self.log_decay.shape[0] == 2

    @property
    def value_offset(self) -> int:
        """Entries from the key memory's set to the value memory's: P * H * C, or 0 where they share one."""
        return self.log_decay[0].numel() if self.own else 0

    def of(self, memory: int) -> tuple[Tensor, Tensor]:
        """(l, gamma) [P, H, C] of memory 0 (key) or 1 (value)."""
        own = memory if self.own else 0
        return self.log_decay[own], self.step[own]


def derive_gates(operands: Operands, layout: PackedLayout) -> Gates:
    """Gates in chunk order from the operands' (any float dtype)."""
    log_decay, step = operands.log_decay, operands.step_size
    sets = 1 if operands.value_log_decay is None and operands.value_step_size is None else 2
    shape = (sets, layout.num_chunks, log_decay.shape[2], layout.chunk_size)
    gates = Gates(*(torch.empty(shape, dtype=torch.float32, device=log_decay.device) for _ in range(2)))
    _derive[_grid(layout, shape[2], sets)](
        log_decay.contiguous(),
        step.contiguous(),
        _own(operands.value_log_decay, log_decay),
        _own(operands.value_step_size, step),
        gates.log_decay,
        gates.step,
        *layout.chunk_tokens,
        shape[2],
        **_sizes(layout, shape[2]),
    )
    return gates


def gate_gradients(
    rows: Tensor, dgamma: Tensor, end: Tensor, gates: Gates, *, operands: Operands, layout: PackedLayout
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of (log_decay, step_size, value_log_decay, value_step_size), each in its operand's dtype.

    Args:
        rows: each memory's part of dl without the step size's, fp32 [2, P, H, C]; pads are not read.
        dgamma: gradients of the step sizes, fp32 [2, P, H, C]; pads are not read.
        end: what each memory adds to dl at the chunk's last token, in parts that are summed here in order,
            fp32 [2, parts, P, H]: one for each block of slots.
        gates: of ``derive_gates``.
        operands, layout: of the call.

    Returns:
        Token order [B, T, H]; a gate that both memories share gets the sum, a missing one None.
    """
    own = (operands.value_log_decay is not None, operands.value_step_size is not None)
    given = (operands.log_decay, operands.step_size, operands.value_log_decay, operands.value_step_size)
    # every token lies in one chunk, so all of them are written
    out = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    assert out[0] is not None, "log_decay is never missing"
    assert end.shape[0] == 2, f"end has shape {tuple(end.shape)}, not [2, parts, P, H]"
    heads = rows.shape[2]
    _gradients[_grid(layout, heads, 1)[:2]](
        *(x.contiguous() for x in (rows, dgamma, end)),
        gates.step,
        gates.value_offset,
        out[0],
        out[1],
        *(o if o is not None else out[0] for o in out[2:]),
        *layout.chunk_tokens,
        heads,
        PARTS=end.shape[1],
        OWN_DECAY=own[0],
        OWN_STEP=own[1],
        **_sizes(layout, heads),
    )
    return out[0], out[1], out[2], out[3]  # type: ignore[return-value]


def _own(gate: Tensor | None, shared: Tensor) -> Tensor:
    return (shared if gate is None else gate).contiguous()


def _grid(layout: PackedLayout, heads: int, sets: int) -> tuple[int, int, int]:
    return layout.num_chunks, triton.cdiv(heads, min(HEADS, triton.next_power_of_2(heads))), sets


def _sizes(layout: PackedLayout, heads: int) -> dict[str, int]:
    c = layout.chunk_size
    return {
        "C": c,
        "BT": min(BLOCK, triton.next_power_of_2(c)),
        "BH": min(HEADS, triton.next_power_of_2(heads)),
        "num_warps": 1 if c <= 16 else 4,
    }


@triton.jit
def _derive(
    log_decay,
    step,
    value_log_decay,
    value_step,
    cumulative,
    gamma,
    first_token,
    lengths,
    heads,
    C: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Grid (P, ceil(H / BH), S)."""
    chunk = tl.program_id(0).to(tl.int64)
    if tl.program_id(2) == 0:
        _derive_one(log_decay, step, cumulative, gamma, first_token, lengths, chunk, heads, C, BT, BH)
    else:
        set_offset = tl.num_programs(0).to(tl.int64) * heads * C
        cumulative += set_offset
        gamma += set_offset
        _derive_one(
            value_log_decay, value_step, cumulative, gamma, first_token, lengths, chunk, heads, C, BT, BH
        )


@triton.jit
def _derive_one(
    log_decay,
    step,
    cumulative,
    gamma,
    first_token,
    lengths,
    chunk,
    heads,
    C: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    before = tl.zeros((BH,), dtype=tl.float32)
    for t in range(0, C, BT):
        j = t + tl.arange(0, BT)
        source = (token + j)[:, None] * heads + head[None, :]
        real = (j < length)[:, None] & (head < heads)[None, :]
        logs = tl.load(log_decay + source, mask=real, other=0.0).to(tl.float32)
        sums = before[None, :] + tl.cumsum(logs, 0)
        last = tl.minimum(t + BT, length) - 1
        # A parallel sum rounds each row its own way even where it adds zeros: pads copy the last real row.
        before = tl.where(t < length, tl.sum(tl.where((j == last)[:, None], sums, 0.0), 0), before)
        sums = tl.where(real, sums, before[None, :])
        target = (chunk * heads + head)[None, :] * C + j[:, None]
        inside = (j < C)[:, None] & (head < heads)[None, :]
        tl.store(cumulative + target, sums, mask=inside)
        steps = tl.load(step + source, mask=real, other=0.0).to(tl.float32)
        tl.store(gamma + target, steps, mask=inside)


@triton.jit
def _row_gradients(rows, dgamma, gamma, inside, real):
    """(dl, dgamma) of one memory, zero on pads."""
    dstep = tl.load(dgamma + inside, mask=real, other=0.0)
    step = tl.load(gamma + inside, mask=real, other=0.0)
    return tl.load(rows + inside, mask=real, other=0.0) - step * dstep, dstep


@triton.jit
def _end(end, memory, chunk, head, chunks, heads, PARTS: tl.constexpr, BH: tl.constexpr):
    """Sum of a memory's end terms, in order."""
    total = tl.zeros((BH,), dtype=tl.float32)
    for part in range(PARTS):
        at = ((memory * PARTS + part) * chunks + chunk) * heads + head
        total += tl.load(end + at, mask=head < heads, other=0.0)
    return total


@triton.jit
def _gradients(
    rows,
    dgamma,
    end,
    gamma,
    value_offset,
    dlog,
    dstep,
    value_dlog,
    value_dstep,
    first_token,
    lengths,
    heads,
    C: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PARTS: tl.constexpr,
    OWN_DECAY: tl.constexpr,
    OWN_STEP: tl.constexpr,
):
    """Grid (P, ceil(H / BH)); both memories in one program: shared gates get their sum in one order."""
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    token, length = tl.load(first_token + chunk), tl.load(lengths + chunk)
    # What a token's log decay reaches beyond its own block: the end terms and all later blocks.
    chunks = tl.num_programs(0).to(tl.int64)
    beyond_key = _end(end, 0, chunk, head, chunks, heads, PARTS, BH)
    beyond_value = _end(end, 1, chunk, head, chunks, heads, PARTS, BH)
    blocks: tl.constexpr = (C + BT - 1) // BT
    for back in range(blocks):
        j = (blocks - 1 - back) * BT + tl.arange(0, BT)
        real = (j < length)[:, None] & (head < heads)[None, :]
        inside = (chunk * heads + head)[None, :] * C + j[:, None]
        second = inside + chunks * heads * C  # the value memory's rows
        key, dkey_step = _row_gradients(rows, dgamma, gamma, inside, real)
        dvalue_step = tl.load(dgamma + second, mask=real, other=0.0)
        value = tl.load(rows + second, mask=real, other=0.0)
        value -= tl.load(gamma + value_offset + inside, mask=real, other=0.0) * dvalue_step
        target = (token + j)[:, None] * heads + head[None, :]
        key_sums = beyond_key[None, :] + tl.cumsum(key, 0, reverse=True)
        value_sums = beyond_value[None, :] + tl.cumsum(value, 0, reverse=True)
        beyond_key += tl.sum(key, 0)
        beyond_value += tl.sum(value, 0)
        if OWN_DECAY:
            tl.store(value_dlog + target, value_sums.to(value_dlog.dtype.element_ty), mask=real)
        else:
            key_sums += value_sums
        tl.store(dlog + target, key_sums.to(dlog.dtype.element_ty), mask=real)
        if OWN_STEP:
            tl.store(value_dstep + target, dvalue_step.to(value_dstep.dtype.element_ty), mask=real)
        else:
            dkey_step += dvalue_step
        tl.store(dstep + target, dkey_step.to(dstep.dtype.element_ty), mask=real)
