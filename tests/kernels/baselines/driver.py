"""One way to hold every baseline to its definition: a loop over tokens in fp64, apart from the kernel.

Shapes: B rows, T tokens, H heads, N documents, D = V head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.grid import Memory, Operation

# (tokens of one document [T, ...] of one head, weights of that head, its memory) -> (y [T, V], memory after)
Definition = Callable[[dict[str, Tensor], dict[str, Tensor], Memory], tuple[Tensor, Memory]]


@dataclass(frozen=True)
class Case:
    """What one recurrence is driven with.

    Attributes:
        operation: the chunkwise form.
        definition: the loop over tokens.
        draw: (generator, B, T) -> tokens and weights.
        memory: (generator, N) -> memories that are entered with.
    """

    operation: Operation
    definition: Definition
    draw: Callable[[torch.Generator, int, int], tuple[dict[str, Tensor], dict[str, Tensor]]]
    memory: Callable[[torch.Generator, int], Memory]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(normal(generator, *shape), dim=-1)


def leaves(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


def by_definition(
    case: Case, tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory, lengths: Sequence[int]
) -> tuple[Tensor, Memory]:
    """The loop over every document and head, in the form of `Operation`."""
    flat = {name: x.flatten(0, 1) for name, x in tokens.items()}
    bounds = [0, *torch.tensor(list(lengths)).cumsum(0).tolist()]
    heads = tokens["v"].shape[2]
    outputs, finals = [], []
    for n in range(len(lengths)):
        here = slice(bounds[n], bounds[n + 1])
        per_head = [
            case.definition(
                {name: x[here, h] for name, x in flat.items()},
                {name: w[h] for name, w in weights.items()},
                tuple(m[n, h] for m in memory),
            )
            for h in range(heads)
        ]
        outputs.append(torch.stack([y for y, _ in per_head], dim=1))
        finals.append([torch.stack(parts) for parts in zip(*(final for _, final in per_head), strict=True)])
    y = torch.cat(outputs).view_as(tokens["v"])
    return y, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def check(
    case: Case,
    lengths: Sequence[int],
    *,
    packed: bool,
    chunk: int,
    seed: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
    bound: float = 1e-10,
) -> None:
    """Outputs, final memories and every gradient, against the definition; relative error below ``bound``.

    With an ``offset`` all documents are entered there in their first chunk, and the definition knows it. The
    chunkwise form computes in ``dtype``, the definition in fp64 from the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    tokens, weights = case.draw(generator, batch, length)
    memory = case.memory(generator, len(lengths))
    layout = PackedLayout.of(tuple(lengths), chunk, offsets=offset)
    if not packed:
        layout = PackedLayout.uniform(batch, length, chunk, offset=offset)
    names = [*tokens, *weights]
    inputs = [x.to(dtype) for x in (*tokens.values(), *weights.values(), *memory)]
    results = []
    for run, width in (
        (lambda t, w, m: case.operation(t, w, m, layout), dtype),
        (lambda t, w, m: by_definition(case, t, w, m, lengths), torch.float64),
    ):
        xs = leaves([x.to(width) for x in inputs])
        given = dict(zip(names, xs, strict=False))
        y, final = run(
            {name: given[name] for name in tokens},
            {name: given[name] for name in weights},
            tuple(xs[len(names) :]),
        )
        directions = torch.Generator().manual_seed(seed + 1)
        loss = sum((out * normal(directions, *out.shape)).sum() for out in (y, *final))
        results.append([y, *final, *torch.autograd.grad(loss, xs, materialize_grads=True)])
    labels = ["y", *(f"memory {i}" for i in range(len(memory)))]
    labels += [f"gradient of {name}" for name in [*names, *(f"memory {i}" for i in range(len(memory)))]]
    for label, ours, expected in zip(labels, *results, strict=True):
        error = (ours - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < bound, f"{label}: relative error {error:.1e}"
