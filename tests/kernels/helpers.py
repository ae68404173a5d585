"""Random operands, one call with every gradient, and the comparison all kernel tests use."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import CompressState, compress_kv

TRITON_CASES = Path(__file__).with_name("on_triton.py")
ROOT = TRITON_CASES.parents[2]
TOLERANCE = 1e-12  # of chunkwise in fp64, relative to the largest entry
OWN_GATES = ("value_log_decay", "value_step_size")
AFFINE = ("readout_weight", "readout_bias")
MEMORIES = ("key_memory", "value_memory", "key_chunk_start", "value_chunk_start")


def make_operands(
    batch: int = 2,
    length: int = 65,
    heads: int = 2,
    *,
    d: int = 5,
    v: int = 7,
    m: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    extra: Collection[str] = (),
) -> dict[str, Tensor]:
    """Operands as a model makes them: unit queries and keys, values about 1 long, bounded steps.

    ``extra`` names the optional operands to add: the value pass's own gates, the readout affine.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, heads, *shape, generator=g, dtype=torch.float64)

    operands = {
        "q": functional.normalize(draw(d), dim=-1),
        "k": functional.normalize(draw(d), dim=-1),
        "v": functional.normalize(draw(v), dim=-1),
        "alpha": draw(m),
        "log_decay": -0.1 * draw().abs(),
        "step_size": 0.3 * torch.sigmoid(draw()),
    }
    unknown = set(extra) - {*OWN_GATES, *AFFINE}
    assert not unknown, f"no such optional operand: {unknown}"
    for name in sorted(extra):
        if name in AFFINE:
            x = torch.randn(heads, m, generator=g, dtype=torch.float64)
            operands[name] = 0.3 * x + (name == "readout_weight")
        else:
            operands[name] = -0.2 * draw().abs() if "decay" in name else 0.4 * torch.sigmoid(draw())
    return {name: x.to(dtype).requires_grad_() for name, x in operands.items()}


def case_seed(*case: object) -> int:
    """A seed of the case's own: fresh inputs for each, the same ones every time."""
    return zlib.crc32(repr(case).encode())


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as leaves of a graph of their own."""
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def slowed(operands: Mapping[str, Tensor], *, decay: float, step: float) -> dict[str, Tensor]:
    """The same operands with log decays and step sizes scaled: a longer horizon, steps that stay stable."""
    scales = {"decay": decay, "step": step}
    found = dict(operands)
    for name, x in operands.items():
        for part, scale in scales.items():
            if part in name:
                found[name] = (x.detach() * scale).requires_grad_()
    return found


def make_memories(
    operands: Mapping[str, Tensor], documents: int | None = None, *, seed: int = 1
) -> dict[str, Tensor]:
    """Both memories and a chunk-start pair of their own."""
    g = torch.Generator().manual_seed(seed)
    q, v, alpha = operands["q"], operands["v"], operands["alpha"]
    documents = q.shape[0] if documents is None else documents
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def draw(width: int) -> Tensor:
        x = 0.3 * torch.randn(documents, *alpha.shape[2:], width, generator=g, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    return {name: draw(q.shape[3] if "key" in name else v.shape[3]) for name in MEMORIES}


def run(
    operands: Mapping[str, Tensor],
    memories: Mapping[str, Tensor] | None = None,
    *,
    offset: int | tuple[int, ...] = 0,
    seed: int = 2,
    asked: Collection[str] = ("y", *MEMORIES),
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs of one call and, as ``d<name>``, the gradient of every input for random upstream gradients.

    Only outputs that are ``asked`` for have an upstream gradient.
    """
    state = None if memories is None else CompressState(**memories, offset=offset)
    y, final = compress_kv(**operands, initial_state=state, output_final_state=True, **options)
    assert final is not None
    results = {"y": y} | {name: getattr(final, name) for name in MEMORIES}
    inputs = dict(operands) | dict(memories or {})
    g = torch.Generator().manual_seed(seed)
    upstream = {
        name: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for name, x in results.items()
    }
    grads = torch.autograd.grad(
        [results[name] for name in asked],
        list(inputs.values()),
        [upstream[name] for name in asked],
        allow_unused=True,
        materialize_grads=True,
    )
    return results | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def assert_matches_reference(
    operands: Mapping[str, Tensor], memories: Mapping[str, Tensor] | None = None, **options: Any
) -> None:
    """Chunkwise against the token recurrence: outputs, states and every gradient, none of which may be 0.

    Only the chunk-start pair may have none: where no document is entered inside a chunk, and in the linear
    corrected rule, which does not depend on the pair (rounding is what is left).
    """
    expected = run(operands, memories, backend="reference", **options)
    actual = run(operands, memories, backend="chunkwise", **options)
    linear = (options.get("phi"), options.get("update")) == ("identity", "corrected")
    for name, x in list(expected.items()):
        if x.abs().amax() > 1e-12:
            continue
        unused = ("dkey_chunk_start", "dvalue_chunk_start") if linear or not options.get("offset", 0) else ()
        assert name in unused, f"the case does not exercise {name}"
        assert actual.pop(name).abs().amax() <= 1e-12, name
        del expected[name]
    assert_close(actual, expected, TOLERANCE)


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor within ``tolerance``, relative to its largest entry; the message lists the errors."""
    assert actual.keys() == expected.keys(), f"compared {sorted(actual)} with {sorted(expected)}"
    errors = {name: error(actual[name], expected[name]) for name in actual}
    bad = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not bad, f"relative errors over {tolerance}: {bad}"


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of ``expected``; inf where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    scale = expected.abs().amax().double()
    difference = (actual.double() - expected.double()).abs().amax()
    return (difference / scale.clamp_min(1e-30)).item() if difference != 0 else 0.0


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor bitwise the same."""
    bad = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not bad, f"not bitwise equal: {bad}"


def in_own_process(arguments: list[str], **environment: str) -> None:
    """Run Python with ``arguments`` from the repository root; a failure shows its output."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
