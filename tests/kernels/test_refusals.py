"""Bad input is a ValueError that names the argument and what it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import CompressState, PackedLayout, compress_kv, decode_step
from tests.kernels.helpers import make_operands

SHAPES = [
    ("q", (2, 10, 2), r"q has shape \(2, 10, 2\): it should be \[B, T, H, D\]"),
    ("q", (2, 0, 2, 5), "q has shape .* none of them 0"),
    ("k", (2, 10, 2, 4), r"k has shape \(2, 10, 2, 4\).*should be \[2, 10, 2, 5\]"),
    ("v", (2, 9, 2, 7), r"v has shape .*should be \[2, 10, 2, V\]"),
    ("alpha", (2, 10, 3, 6), r"alpha has shape .*should be \[2, 10, 2, M\]"),
    ("log_decay", (2, 10, 2, 1), r"log_decay has shape .*should be \[2, 10, 2\]"),
    ("step_size", (2, 10), r"step_size has shape .*should be \[2, 10, 2\]"),
]


def call(**changes: Any) -> Any:
    operands: dict[str, Any] = dict(make_operands(2, 10))
    return compress_kv(**(operands | {"chunk_size": 4} | changes))


@pytest.mark.parametrize("name, shape, message", SHAPES)
def test_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**{name: torch.zeros(shape, dtype=torch.float64)})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"v": torch.zeros(2, 10, 2, 7, dtype=torch.int64)},
            "v has dtype torch.int64: it should be a floating",
        ),
        ({"k": torch.zeros(2, 10, 2, 5, device="meta")}, "k is on meta and q on cpu"),
        ({"log_decay": torch.full((2, 10, 2), 0.5)}, "log_decay reaches 0.5: it should be <= 0"),
        ({"log_decay": torch.full((2, 10, 2), float("nan"))}, "log_decay reaches nan"),
        ({"step_size": torch.full((2, 10, 2), -1.0)}, "step_size reaches -1: it should be >= 0"),
        ({"chunk_size": 0}, "chunk_size = 0: use 1 or more"),
        ({"phi": "relu"}, "phi = 'relu': use one of silu, tanh"),
        ({"readout": "relu"}, "readout = 'relu': use one of ln_silu"),
        ({"backend": "cuda"}, "backend = 'cuda': use one of auto"),
        ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens with B = 2"),
        ({"layout": PackedLayout.uniform(2, 9, 4)}, "layout counts 18 tokens, the operands 20"),
        ({"layout": PackedLayout.uniform(2, 10, 5)}, "layout has chunk_size 5, the call 4"),
        ({"layout": PackedLayout.uniform(2, 10, 4, offset=1)}, "layout is built for offset"),
        (
            {"layout": PackedLayout.uniform(2, 10, 4), "cu_seqlens": torch.tensor([0, 20])},
            "layout and cu_seqlens are both given",
        ),
        (
            {"initial_state": CompressState(torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 6, 7))},
            r"initial_state.key_memory has shape .*should be \(2, 2, 6, 5\)",
        ),
        (
            {"initial_state": CompressState(torch.zeros(2, 2, 6, 5), torch.zeros(2, 2, 6, 7), offset=3)},
            "initial_state.key_chunk_start is None at offset 3",
        ),
        (
            {"initial_state": CompressState(*[torch.zeros(2, 2, 6, n) for n in (5, 7, 5, 7)], offset=4)},
            r"offset = \(4, 4\).*it is in \[0, 4\)",
        ),
        (
            {"initial_state": CompressState(*[torch.zeros(2, 2, 6, n) for n in (5, 7, 5, 7)], offset=(1,))},
            "1 offsets for 2 documents",
        ),
    ],
)
def test_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "bounds, message",
    [
        ([0, 5, 5, 10], r"cu_seqlens\[2\] = 5 after 5: it must increase"),
        ([0, 7, 5, 10], r"cu_seqlens\[2\] = 5 after 7"),
        ([1, 10], r"cu_seqlens\[0\] = 1: the first document starts at token 0"),
        ([0], r"cu_seqlens has shape \(1,\)"),
        ([0.0, 10.0], "dtype torch.float32: give an integer vector"),
    ],
)
def test_document_bounds(bounds: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_cu_seqlens(torch.tensor(bounds), 4)


def test_decode_refuses_what_the_parallel_form_refuses() -> None:
    q, k, v, alpha, log_decay, step = (x.detach()[:, 0] for x in make_operands(2, 1).values())
    state = CompressState(torch.zeros(2, 2, 6, 5), torch.zeros(2, 2, 6, 7))
    with pytest.raises(ValueError, match=r"q has shape .*should be \[B, H, D\]"):
        decode_step(q[:, None], k, v, alpha, log_decay, step, state, chunk_size=4)
    with pytest.raises(ValueError, match="phi = 'relu'"):
        decode_step(q, k, v, alpha, log_decay, step, state, chunk_size=4, phi="relu")
    wrong = CompressState(*[torch.zeros(2, 2, 6, n) for n in (5, 7, 5, 7)], offset=9)
    with pytest.raises(ValueError, match=r"state\.offset = 9"):
        decode_step(q, k, v, alpha, log_decay, step, wrong, chunk_size=4)
