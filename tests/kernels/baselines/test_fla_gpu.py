"""flash-linear-attention's kernels against our chunkwise forms: what only a CUDA device can show."""

from __future__ import annotations

import pytest
import torch

from kernels import PackedLayout
from kernels.baselines import fla
from kernels.baselines.grid import Operation
from tests.kernels.baselines.test_fla import CASES, drawn, name_of


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "decays"), CASES, ids=name_of)
@pytest.mark.parametrize("lengths", [(192, 192), (5, 130, 257)], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_computes_what_the_torch_form_does(
    operation: Operation, decays: bool, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Outputs, memories and every gradient in bf16 or TF32, against fp32; RMS ratio below 2%."""
    packed = len(set(lengths)) > 1
    rows, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    layout = PackedLayout.of(lengths, 64) if packed else PackedLayout.uniform(rows, length, 64)
    where = {"device": "cuda", "dtype": dtype}
    tokens, memory = drawn(operation, decays, rows=rows, length=length, documents=len(lengths), **where)
    results = []
    for run, wide in ((fla.on_gpu(operation), None), (operation, torch.float32)):
        leaves = {n: x.to(wide or x.dtype).detach().requires_grad_() for n, x in tokens.items()}
        first = tuple(m.detach().clone().requires_grad_() for m in memory)
        y, final = run(leaves, {}, first, layout.to("cuda"))
        loss = sum((x.float() * _weights(x)).sum() for x in (y, *final))
        results.append([y, *final, *torch.autograd.grad(loss, [*leaves.values(), *first])])
    for ours, expected in zip(*results, strict=True):
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.02


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)
