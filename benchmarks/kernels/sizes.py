"""Shapes, random operands as a model makes them, and the floors of a call in bytes and arithmetic.

Per token and head, b bytes an operand, F = D + V, W = b M F / C (the two memories of a chunk in the operands'
type, spread over its tokens), 8 bytes of gates. "least" moves every operand and result once; "staged" is what
the split into stages has to move through device memory (everything inside a stage stays on the chip; the few
memories kept for backward are left out):

    forward   least    q, k, v, alpha, gates in; y out
              staged   scan: k, v, alpha in, W out;   readout: q, k, v, alpha, W in, y out
    backward  least    q, k, v, alpha, dy, gates in; dq, dk, dv, dalpha, dgates out
              staged   scan again: k, v, alpha in, W out
                       readout:    q, k, v, alpha, dy, W in; dq, dW (2 M b), dS and dR (W) out
                       reverse:    k, v, alpha, dW, W, W in; adjoints W out
                       inputs:     q, k, v, alpha, dy, W, W in; dk, dv, dalpha, dgates out

Arithmetic counts a multiply-add as 2 and causal C x C products as half; recomputation in backward is counted,
as the stages do it:

    forward   scan 4 M F;  inner gradients again 2 M F;  states 2 M F;  inside the chunk C (D + 2 M + V)
              corrected, both passes: X X^T and the triangular solve, C (F + 2 M)
    backward  scan again 4 M F;  inner gradients 2 M F;  readout 2 M (3 D + 2 V) + C (3 D + 6 M + 2 V)
              reverse 4 M F;  inputs 4 M F;  corrected 2 C (F + 2 M) + C (2 F + 4 M)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Shape", "arithmetic", "floor_bytes", "make_operands"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; values are as wide as keys.

    Attributes:
        batch, length, heads, width, slots: B, T, H, D = V, M.
        chunk: C.
        update: "stale" or "corrected".
    """

    batch: int
    length: int
    heads: int
    width: int
    slots: int = 64
    chunk: int = 64
    update: str = "stale"

    @property
    def name(self) -> str:
        """BxTxHxD."""
        return f"{self.batch}x{self.length}x{self.heads}x{self.width}"

    @property
    def tokens(self) -> int:
        """Tokens of the call."""
        return self.batch * self.length

    @property
    def chunks(self) -> int:
        """Chunks of a sequence, the scan's sequential steps."""
        return -(-self.length // self.chunk)


def make_operands(
    shape: Shape, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Operands of ``compress_kv``: unit queries, keys and values, targets about 1, bounded steps, fp32 gates.

    The step of a stale update is bounded over the whole chunk, 2 / C for a token (docs/math.md).
    """
    g = torch.Generator(device=device).manual_seed(seed)
    leading = (shape.batch, shape.length, shape.heads)
    gate_type = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*width: int) -> Tensor:
        return torch.randn(*leading, *width, generator=g, device=device, dtype=gate_type)

    operands = {name: functional.normalize(draw(shape.width), dim=-1).to(dtype) for name in ("q", "k", "v")}
    operands["alpha"] = draw(shape.slots).to(dtype)
    operands["log_decay"] = functional.logsigmoid(draw() + 3)
    bound = 2 / shape.chunk if shape.update == "stale" else 1.0
    operands["step_size"] = bound * torch.sigmoid(draw())
    return {name: x.requires_grad_() for name, x in operands.items()}


def floor_bytes(shape: Shape, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes of forward and backward: {"forward": {"least": ., "staged": .}, "backward": ...}."""
    d = v = shape.width * itemsize
    m, gates = shape.slots * itemsize, 8
    memory = itemsize * shape.slots * 2 * shape.width / shape.chunk
    write = 2 * m
    scan = d + v + m + gates + memory
    readout = d + d + v + m + gates + memory + v
    local = readout + d + write + memory  # dy comes in where y went out
    reverse = d + v + m + gates + write + 2 * memory + memory
    inputs = 2 * d + 2 * v + m + gates + 2 * memory + d + v + m + gates
    per_token = {
        "forward": {"least": 2 * d + 2 * v + m + gates, "staged": scan + readout},
        "backward": {
            "least": 2 * d + 2 * v + m + gates + 2 * d + v + m + gates,
            "staged": scan + local + reverse + inputs,
        },
    }
    count = shape.tokens * shape.heads
    return {part: {kind: round(x * count) for kind, x in kinds.items()} for part, kinds in per_token.items()}


def arithmetic(shape: Shape) -> dict[str, int]:
    """Floating-point operations of forward and backward."""
    d = v = shape.width
    m, c, f = shape.slots, shape.chunk, 2 * shape.width
    forward = 8 * m * f + c * (d + 2 * m + v)
    backward = 14 * m * f + 2 * m * (3 * d + 2 * v) + c * (3 * d + 6 * m + 2 * v)
    if shape.update == "corrected":
        forward += c * (f + 2 * m)
        backward += 2 * c * (f + 2 * m) + c * (2 * f + 4 * m)
    count = shape.tokens * shape.heads
    return {"forward": forward * count, "backward": backward * count}
