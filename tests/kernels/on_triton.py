"""The Triton kernels against fp64; test_triton.py and test_gpu.py run this file in a process of its own.

On a CPU triton has to be imported under TRITON_INTERPRET=1, which other tests' imports must not decide.
Scratch memory starts as NaN: whatever a kernel reads without having written it shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout, compress_kv
from kernels.activations import PHI, READOUT
from tests.kernels.helpers import assert_equal, make_memories, make_operands, run

DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _poisoned_scratch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def on_device(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.detach().to(DEVICE, dtype).requires_grad_() for name, x in tensors.items()}


def assert_rms(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Root mean square of the difference over that of the expected tensor, for every tensor."""
    errors = {}
    for name, want in expected.items():
        difference = (actual[name].cpu().double() - want).square().mean().sqrt()
        errors[name] = (difference / want.square().mean().sqrt().clamp_min(1e-12)).item()
    bad = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not bad, f"RMS ratios over {tolerance}: {bad}"


def compare(
    operands: Mapping[str, Tensor],
    memories: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    **options: object,
) -> None:
    rounded = {name: x.detach().to(dtype).double().requires_grad_() for name, x in operands.items()}
    expected = run(rounded, memories, backend="chunkwise", **options)
    inputs = on_device(operands, dtype), on_device(memories, torch.float32)
    assert_rms(run(*inputs, backend="triton", **options), expected, tolerance)


@pytest.mark.parametrize(
    "phi, readout", [*((phi, "ln_silu") for phi in PHI), *(("silu", readout) for readout in READOUT[1:])]
)
def test_activations(phi: str, readout: str) -> None:
    operands = make_operands(1, 19, 2, d=20, v=16, m=24)
    compare(operands, make_memories(operands), chunk_size=8, phi=phi, readout=readout)


@pytest.mark.parametrize("length, chunk_size, offset", [(3, 1, 0), (16, 16, 0), (1, 16, 5), (130, 100, 7)])
def test_lengths_and_offsets(length: int, chunk_size: int, offset: int) -> None:
    operands = make_operands(
        2, length, 1, d=16, v=24, m=40
    )  # two blocks of slots, more tiles than one at C = 100
    compare(operands, make_memories(operands), chunk_size=chunk_size, offset=offset, phi="tanh")


def test_packed_documents_at_their_own_offsets() -> None:
    lengths, offsets = (5, 21, 1, 9), (0, 3, 7, 2)
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), 8, offsets=offsets)
    operands = make_operands(1, sum(lengths), 2, d=16, v=16, m=16)
    compare(operands, make_memories(operands, 4), chunk_size=8, layout=layout, offset=offsets)


def test_half_precision_operands() -> None:
    """bf16 gradients are rounded to bf16; the fp32 state shows what the kernels themselves lose."""
    operands = make_operands(1, 24, 2, d=16, v=16, m=16)
    compare(operands, make_memories(operands), chunk_size=8, dtype=torch.bfloat16, tolerance=4e-3)


def test_no_document_sees_another() -> None:
    clean = {
        name: x.detach().float().to(DEVICE) for name, x in make_operands(1, 30, d=16, v=16, m=16).items()
    }
    spoiled = {name: x.clone() for name, x in clean.items()}
    for name in ("q", "k", "v", "alpha"):
        spoiled[name][:, 11:20] = float("nan")
    results = []
    for operands in (clean, spoiled):
        operands = {name: x.requires_grad_() for name, x in operands.items()}
        cu_seqlens = torch.tensor([0, 11, 20, 30])
        y, _ = compress_kv(**operands, chunk_size=8, cu_seqlens=cu_seqlens, backend="triton")
        grads = torch.autograd.grad(y, list(operands.values()), torch.ones_like(y))
        results.append({"y": y} | dict(zip(operands, grads, strict=True)))
    for part in (slice(0, 11), slice(20, 30)):
        assert_equal(*({name: x[:, part] for name, x in r.items()} for r in results))


def test_segments_at_chunk_multiples_leave_the_same_bits() -> None:
    operands = {n: x.detach().float().to(DEVICE) for n, x in make_operands(2, 32, d=16, v=16, m=16).items()}
    options = {"chunk_size": 8, "backend": "triton", "output_final_state": True}
    whole, end = compress_kv(**operands, **options)
    head, middle = compress_kv(**{n: x[:, :24] for n, x in operands.items()}, **options)
    tail, last = compress_kv(**{n: x[:, 24:] for n, x in operands.items()}, initial_state=middle, **options)
    assert end is not None
    assert last is not None
    assert torch.equal(torch.cat((head, tail), 1), whole)
    assert torch.equal(last.key_memory, end.key_memory)
    assert torch.equal(last.value_memory, end.value_memory)
