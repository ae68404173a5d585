"""Parts of the Triton backend against fp64; test_triton_parts.py runs this file in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.record import Deadline
from benchmarks.tune_kernels import Tuner, tune
from kernels.activations import PHI, READOUT, UPDATE, apply_readout, inner_gradient
from kernels.layout import PackedLayout
from kernels.triton import launch
from kernels.triton.decode import triton_decode
from kernels.triton.gates import derive_gates, gate_gradients
from kernels.triton.triangular import diagonal_inverses
from kernels.types import Operands, Rule
from tests.largest import largest

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
RAGGED = ((20, 1, 70), (3, 0, 7))  # lengths, and offsets of the documents that are entered inside a chunk


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


@pytest.mark.parametrize(
    "chunk_size, own",
    [
        *((c, (False, True)) for c in (1, 16, 64, 100, 512)),
        *((5, own) for own in product((False, True), repeat=2)),
    ],
)
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
        assert rms(log_decay, want[0]) <= 3e-7  # a few roundings of fp32
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
    lengths, heads = (chunk_size + 5, 1), 1
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


WIDTHS = {"d": 20, "v": 48, "m": 24}


def token_operands(batch: int, heads: int, *, options: bool, seed: int, d: int, v: int, m: int) -> Operands:
    """Operands of one token in fp64; with ``options`` the value pass's gates and the affine too."""
    rows = [torch.nn.functional.normalize(draw(batch, heads, w, seed=seed + w), dim=-1) for w in (d, v)]
    gates = [
        g
        for i in range(2)
        for g in (
            -0.2 * draw(batch, heads, seed=seed + i).abs(),
            draw(batch, heads, seed=seed + 7 + i).sigmoid(),
        )
    ]
    affine = (1 + 0.3 * draw(heads, m, seed=3), 0.2 * draw(heads, m, seed=4))
    query, alpha = draw(batch, heads, d, seed=seed + 1), draw(batch, heads, m, seed=seed + 2)
    more = (*gates[2:], *affine) if options else (None,) * 4
    return Operands(query, *rows, alpha, *gates[:2], *more)


def write_one(
    S: Tensor, start: Tensor, x: Tensor, alpha: Tensor, gates: tuple[Tensor, Tensor], rule: Rule
) -> tuple[Tensor, Tensor]:
    beta, gamma = gates[0].exp()[..., None, None], gates[1][..., None]
    start = beta * start if rule.corrected else start
    z = (start @ x[..., None]).squeeze(-1)
    u = inner_gradient(z, alpha, rule.phi)
    if rule.corrected:
        u = u + (beta * S @ x[..., None]).squeeze(-1) - z
    return beta * S - (gamma * u)[..., None] * x[..., None, :], start


def plain_step(
    x: Operands, state: list[Tensor], offset: Tensor, *, chunk_size: int, rule: Rule
) -> tuple[Tensor, list[Tensor]]:
    """The recurrence in fp64, with one offset for each sequence."""
    first, last = (t[:, None, None, None] for t in (offset == 0, offset + 1 == chunk_size))
    start = [torch.where(first, s, p) for s, p in zip(state[:2], state[2:], strict=True)]
    value_gates = [g if own is None else own for own, g in zip(x[6:8], x[4:6], strict=True)]
    S, key_start = write_one(state[0], start[0], x.k, x.alpha, x[4:6], rule)
    R, value_start = write_one(state[1], start[1], x.v, x.alpha, tuple(value_gates), rule)
    p = apply_readout((S @ x.q[..., None]).squeeze(-1), rule.readout, x.readout_weight, x.readout_bias)
    pair = [torch.where(last, s, t) for s, t in ((S, key_start), (R, value_start))]
    return (R.mT @ p[..., None]).squeeze(-1), [S, R, *pair]


def fresh_state(batch: int, heads: int, *, d: int, v: int, m: int) -> list[Tensor]:
    return [0.3 * draw(batch, heads, m, w, seed=20 + i) for i, w in enumerate((d, v, d, v))]


@pytest.mark.parametrize(
    "phi, readout", [*((phi, "silu_rms") for phi in PHI), *(("tanh", r) for r in READOUT)]
)
@pytest.mark.parametrize("update", UPDATE)
def test_decode_follows_the_recurrence(phi: str, readout: str, update: str) -> None:
    rule, chunk_size, batch, heads = Rule(phi, readout, update), 3, 2, 2
    want = fresh_state(batch, heads, **WIDTHS)
    state = tuple(x.to(DEVICE, torch.float32) for x in want)
    for t in range(1, 6):  # from inside a chunk, across two boundaries
        step = token_operands(batch, heads, options=t % 2 == 0, seed=100 * t, **WIDTHS)
        offset = t % chunk_size
        y, want = plain_step(step, want, torch.full((batch,), offset), chunk_size=chunk_size, rule=rule)
        given = Operands(*(None if x is None else x.to(DEVICE, torch.float32) for x in step))
        actual, state = triton_decode(given, state, offset, chunk_size=chunk_size, rule=rule)
        for a, b in zip((actual, *state), (y, *want), strict=True):
            assert rms(a, b) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(16, 128, 16), (128, 16, 128), (96, 48, 100), (48, 96, 64)])
def test_decode_widths_and_types(widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    sizes = dict(zip("dvm", widths, strict=True))
    state = fresh_state(1, 2, **sizes)
    step = token_operands(1, 2, options=True, seed=5, **sizes)
    given = Operands(*(None if x is None else x.to(DEVICE, dtype) for x in step))
    y, want = plain_step(
        Operands(*(None if x is None else x.double().cpu() for x in given)),
        state,
        torch.tensor([0]),
        chunk_size=1,
        rule=Rule(),
    )
    memories = tuple(x.to(DEVICE, torch.float32) for x in state)
    actual, new = triton_decode(given, memories, 0, chunk_size=1, rule=Rule())
    assert actual.dtype == dtype
    assert rms(actual, y) <= (5e-3 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5)
    assert largest(rms(a, b) for a, b in zip(new, want, strict=True)) <= 1e-5


@pytest.mark.parametrize("update", UPDATE)
@pytest.mark.parametrize("in_place", [False, True])
def test_decode_with_offsets_on_the_device(update: str, in_place: bool) -> None:
    """Sequences at offsets of their own; the step in place is what a captured graph replays."""
    rule, chunk_size, heads = Rule("silu", "ln_silu", update), 4, 2
    offset = torch.tensor([0, 1, 3])
    want = fresh_state(3, heads, **WIDTHS)
    state = tuple(x.to(DEVICE, torch.float32) for x in want)
    device_offset = offset[:, None].repeat(1, heads).to(DEVICE, torch.int32)
    for t in range(5):
        step = token_operands(3, heads, options=True, seed=100 * t, **WIDTHS)
        y, want = plain_step(step, want, offset, chunk_size=chunk_size, rule=rule)
        given = Operands(*(None if x is None else x.to(DEVICE, torch.float32) for x in step))
        before, kept = [x.clone() for x in state], state
        following = device_offset if in_place else torch.empty_like(device_offset)
        actual, state = triton_decode(
            given,
            state,
            device_offset,
            chunk_size=chunk_size,
            rule=rule,
            out=state if in_place else None,
            next_offset=following,
        )
        offset, device_offset = (offset + 1) % chunk_size, following
        assert torch.equal(device_offset.cpu(), offset[:, None].repeat(1, heads).int())
        assert in_place or all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
        for a, b in zip((actual, *state), (y, *want), strict=True):
            assert rms(a, b) <= 1e-5


def test_decode_takes_one_offset_a_sequence() -> None:
    step = token_operands(2, 3, options=False, seed=1, **WIDTHS)
    given = Operands(*(None if x is None else x.to(DEVICE, torch.float32) for x in step))
    state = tuple(x.to(DEVICE, torch.float32) for x in fresh_state(2, 3, **WIDTHS))
    for rule in (Rule(), Rule(update="corrected")):
        by_sequence = triton_decode(
            given, state, torch.tensor([2, 2], device=DEVICE), chunk_size=4, rule=rule
        )
        together = triton_decode(given, state, 2, chunk_size=4, rule=rule)
        for a, b in zip((by_sequence[0], *by_sequence[1]), (together[0], *together[1]), strict=True):
            assert torch.equal(a, b)


def test_the_tuner_writes_what_its_clock_prefers(tmp_path: Path) -> None:
    """The whole search on a CPU: two candidates each, and a clock that likes the second of two kernels."""
    text, said = "1,20,1,16,16,16,corrected", []
    size = launch.Size(launch.architecture(torch.device(DEVICE)), 16, 16, 16, 16, True, 4)
    rule = {kernel: launch.rule(kernel, size) for kernel in launch.KERNELS}
    other = {kernel: replace(base, warps=base.warps * 2) for kernel, base in rule.items()}
    liked = ("inputs", "decode")

    def timer(work: Callable[[int], object], repetitions: int) -> list[float]:
        found = {kernel: launch.parameters(kernel, size) for kernel in liked}
        return [3.0 - sum(found[kernel] == other[kernel] for kernel in liked)] * repetitions

    def two(kernel: str, size: launch.Size) -> list[launch.Launch]:
        return [rule[kernel], other[kernel]]

    source = {"device": "a test", "versions": {}, "kernels": "0"}
    tuner = Tuner(torch.device(DEVICE), torch.float32, timer, two, source, sets=2, repetitions=3)
    path = tmp_path / "table.json"
    assert tune([text], path, tuner, deadline=Deadline(), say=said.append) == []
    (row,) = launch.load_table(path).values()
    assert row.size == size
    assert row.launches == rule | {kernel: other[kernel] for kernel in liked}
    assert row.source["kind"] == "measured"
    assert row.source["milliseconds"]["both"]["chosen"]["median"] == 2.0
    assert "inputs" in said[-1]
    assert tune([text], path, tuner, deadline=Deadline(), say=said.append) == []  # measured already
    assert "1 of 1 shapes" in said[-2]
    assert tune([text], path, tuner, deadline=Deadline(0.0), again=True, say=said.append) == [text]
