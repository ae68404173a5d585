"""The chunkwise forms as training calls them: fp32, chunks of 64, documents longer than a chunk."""

from __future__ import annotations

import functools

import pytest
import torch

from kernels.baselines.titans import titans
from kernels.baselines.ttt import ttt_linear
from tests.kernels.baselines import test_linear, test_rwkv7, test_slots, test_titans, test_ttt
from tests.kernels.baselines.driver import Case, check

MINI_BATCH = 16
CHUNKWISE = {**test_linear.CASES, **test_rwkv7.CASES, **test_slots.CASES}
MINI_BATCHES = {
    "ttt": Case(
        ttt_linear,
        functools.partial(test_ttt.loop, offset=0, chunk=MINI_BATCH),
        test_ttt.drawing(MINI_BATCH),
        test_ttt.memory,
    ),
    "titans": Case(
        titans,
        functools.partial(test_titans.loop, offset=0, chunk=MINI_BATCH),
        test_titans.draw,
        functools.partial(test_titans.memory, depth=1),
    ),
}


@pytest.mark.parametrize("name", [*CHUNKWISE, *MINI_BATCHES])
@pytest.mark.parametrize(("lengths", "packed"), [([130], False), ([5, 130], True)], ids=["rows", "packed"])
def test_chunks_in_fp32_give_what_tokens_give(name: str, lengths: list[int], packed: bool):
    """Outputs, memories and all gradients; most are within 1e-5, the largest error is 6e-5."""
    case, chunk = (MINI_BATCHES[name], MINI_BATCH) if name in MINI_BATCHES else (CHUNKWISE[name], 64)
    check(case, lengths, packed=packed, chunk=chunk, dtype=torch.float32, bound=2e-4)
