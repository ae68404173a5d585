"""Parts of the Triton backend against fp64; test_triton_parts.py runs this file in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.layout import PackedLayout
from kernels.triton.gates import derive_gates, gate_gradients
from kernels.triton.triangular import diagonal_inverses
from kernels.types import Operands

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
RAGGED = ((40, 1, 130), (3, 0, 7))  # lengths, and offsets of the documents that are entered inside a chunk


@pytest.fixture(autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``."""
    difference = (actual.detach().cpu().double() - expected.detach().cpu().double()).square().mean().sqrt()
    return (difference / expected.detach().double().square().mean().sqrt().clamp_min(1e-30)).item()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged_layout(chunk_size: int) -> PackedLayout:
    lengths, offsets = RAGGED
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    offsets = tuple(o % chunk_size for o in offsets)
    return PackedLayout.from_cu_seqlens(bounds, chunk_size, offsets=offsets).to(DEVICE)


def gate_operands(tokens: int, heads: int, *, own: tuple[bool, bool], dtype: torch.dtype) -> Operands:
    gates = [
        -draw(1, tokens, heads, seed=i).abs() if i % 2 == 0 else draw(1, tokens, heads, seed=i).abs()
        for i in range(4)
    ]
    given = [g.to(DEVICE, dtype) if keep else None for g, keep in zip(gates, (True, True, *own), strict=True)]
    unused = torch.empty(0, device=DEVICE)
    return Operands(unused, unused, unused, unused, *given)


def expected_gates(log_decay: Tensor, step: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """(l, gamma) [P, H, C] in fp64; differentiable."""
    pads = None if layout.valid is None else ~layout.valid[:, None, :]
    log_decay, step = (layout.to_chunks(x.double()[..., None]).squeeze(-1) for x in (log_decay, step))
    if pads is not None:
        log_decay, step = log_decay.masked_fill(pads, 0), step.masked_fill(pads, 0)
    return log_decay.cumsum(-1), step


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64, 100, 512])
@pytest.mark.parametrize("own", [(False, False), (True, False), (False, True), (True, True)])
def test_gates_forward_and_backward(chunk_size: int, own: tuple[bool, bool]) -> None:
    layout, heads = ragged_layout(chunk_size), 3
    dtype = torch.bfloat16 if chunk_size == 16 else torch.float32
    operands = gate_operands(layout.num_tokens, heads, own=own, dtype=dtype)
    gates = derive_gates(operands, layout)
    leaves = [None if x is None else x.double().requires_grad_() for x in operands[4:8]]
    key = expected_gates(leaves[0], leaves[1], layout)
    value = expected_gates(
        leaves[0 if leaves[2] is None else 2], leaves[1 if leaves[3] is None else 3], layout
    )
    assert gates.own == any(own)
    for memory, want in enumerate((key, value)):
        log_decay, step = gates.of(memory)
        assert rms(log_decay, want[0]) <= 1e-7
        assert torch.equal(step.double(), want[1])
    shape = (2, layout.num_chunks, heads, chunk_size)
    rows, dgamma = (draw(*shape, seed=s).to(DEVICE, torch.float32) for s in (5, 6))
    end = draw(2, 2, *shape[1:3], seed=7).to(DEVICE, torch.float32)
    grads = gate_gradients(rows, dgamma, end, gates, operands=operands, layout=layout)
    loss = 0.0
    for memory, (log_decay, step) in enumerate((key, value)):
        dl = rows[memory] - step.detach() * dgamma[memory]
        loss += (log_decay * dl).sum() + (step * dgamma[memory]).sum()
        if layout.valid is not None:  # rows of pads do not count
            loss -= (log_decay * dl * ~layout.valid[:, None]).sum()
        loss += (log_decay[..., -1] * end[memory].sum(0)).sum()
    given = [x for x in leaves if x is not None]
    wanted = torch.autograd.grad(loss, given)
    got = [g for g in grads if g is not None]
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
    for actual, want in zip(got, wanted, strict=True):
        assert actual.dtype == dtype
        assert rms(actual, want) <= tolerance


def test_gates_are_flat_over_pads() -> None:
    layout = ragged_layout(64)
    operands = gate_operands(layout.num_tokens, 20, own=(False, False), dtype=torch.float32)
    log_decay, step = derive_gates(operands, layout).of(0)
    _, lengths = layout.chunk_tokens
    for chunk, length in enumerate(lengths.tolist()):
        pads = log_decay[chunk, :, length - 1 :]
        assert torch.equal(pads, pads[:, :1].expand_as(pads))
        assert not step[chunk, :, length:].any()


def expected_inverses(
    x: Tensor, log_decay: Tensor, step: Tensor, *, layout: PackedLayout, tokens: int
) -> Tensor:
    """[P, H, tiles, tokens, tokens] in fp64 from the rounded gates, by torch.linalg."""
    chunks = layout.to_chunks(x.double())
    if layout.valid is not None:
        chunks = chunks * layout.valid[:, None, :, None]
    log_decay, step = log_decay.double(), step.double()
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).tril(-1).exp()
    lower = ((chunks @ chunks.mT) * decay * step[..., None, :]).tril(-1)
    c, tiles = lower.shape[-1], -(-lower.shape[-1] // tokens)
    lower = torch.nn.functional.pad(lower, (0, tiles * tokens - c, 0, tiles * tokens - c))
    blocks = lower.unflatten(-1, (tiles, tokens)).unflatten(-3, (tiles, tokens))
    diagonal = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    eye = torch.eye(tokens, dtype=torch.float64, device=x.device)
    return torch.linalg.solve_triangular(
        diagonal + eye, eye.expand_as(diagonal), upper=False, unitriangular=True
    )


@pytest.mark.parametrize("chunk_size", [1, 16, 48, 64, 100])
@pytest.mark.parametrize("tokens", [16, 32, 64])
@pytest.mark.parametrize("equal", [False, True])
def test_diagonal_inverses(chunk_size: int, tokens: int, equal: bool) -> None:
    lengths, heads = (chunk_size + 5, 1), 2
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), chunk_size).to(DEVICE)
    total = sum(lengths)
    dtype = torch.bfloat16 if tokens == 32 else torch.float32
    key, value = (torch.nn.functional.normalize(draw(1, total, heads, w, seed=w), dim=-1) for w in (20, 48))
    operands = gate_operands(total, heads, own=(True, True), dtype=torch.float32)
    if equal:  # the inverse is bidiagonal: whatever cancels shows
        key, value = (torch.ones_like(x) * x.shape[-1] ** -0.5 for x in (key, value))
        operands = operands._replace(
            step_size=torch.ones_like(operands.step_size), log_decay=operands.log_decay * 0
        )
    x = tuple(a.to(DEVICE, dtype) for a in (key, value))
    gates = derive_gates(operands, layout)
    inverses = diagonal_inverses(x, gates.log_decay, gates.step, layout, tokens=tokens)
    assert inverses.shape == (2, layout.num_chunks, heads, -(-chunk_size // tokens), tokens, tokens)
    for memory in range(2):
        want = expected_inverses(x[memory], *gates.of(memory), layout=layout, tokens=tokens)
        assert rms(inverses[memory], want) <= 1e-6
