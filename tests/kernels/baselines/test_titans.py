"""Titans' memory: chunkwise against a loop over tokens, mini-batches entered inside, and fla's form."""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.grid import Memory
from kernels.baselines.titans import titans
from tests.kernels.baselines.driver import Case, check, leaves, normal

HEADS, WIDTH = 2, 4
# (lengths, packed, mini-batch, offset)
GRIDS = [
    ([8, 8], False, 4, 0),
    ([7, 7], False, 4, 0),
    ([1, 9, 4, 2], True, 4, 0),
    ([5], False, 1, 0),
    ([3], False, 8, 0),
    ([9, 9], False, 4, 3),
    ([1, 7, 3, 2], True, 4, 1),
    ([2, 2], False, 8, 5),
]


def norm(z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    centred = z - z.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * weights["norm_weight"] + weights["norm_bias"]


def mlp(x: Tensor, layers: Memory) -> Tensor:
    for layer in layers[:-1]:
        x = torch.nn.functional.silu(x @ layer)
    return x @ layers[-1]


def loop(
    tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory, *, offset: int, chunk: int
) -> tuple[Tensor, Memory]:
    """Token by token, gradients by autograd of the inner loss at the mini-batch's start."""
    state, start = memory
    layers, momenta, start, outputs = (*(x.unbind(0) for x in (*state.unbind(1), start)), [])
    for t, slot in enumerate(range(offset, offset + len(tokens["q"]))):
        q, k, v, step, log_keep, log_momentum = (tokens[name][t] for name in TOKENS)
        if slot % chunk == 0:
            start = layers

        def loss(layers: Memory, k: Tensor = k, v: Tensor = v) -> Tensor:
            return (k + norm(mlp(k, layers), weights) - v).square().sum() / 2

        slopes = torch.func.grad(loss)(start)
        momenta = tuple(log_momentum.exp() * s - step * g for s, g in zip(momenta, slopes, strict=True))
        layers = tuple(log_keep.exp() * m + s for m, s in zip(layers, momenta, strict=True))
        outputs.append(q + norm(mlp(q, layers), weights))
        if slot % chunk == chunk - 1:
            start = layers
    state = torch.stack([torch.stack(layers), torch.stack(momenta)], dim=1)
    return torch.stack(outputs), (state, torch.stack(start))


TOKENS = ("q", "k", "v", "step", "log_keep", "log_momentum")


def draw(generator: torch.Generator, batch: int, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shape = (batch, length, HEADS)
    tokens = {name: normal(generator, *shape, WIDTH) for name in ("q", "k", "v")}
    tokens["step"] = 0.1 * torch.sigmoid(normal(generator, *shape))
    tokens["log_keep"] = torch.nn.functional.logsigmoid(2 + normal(generator, *shape))
    tokens["log_momentum"] = torch.nn.functional.logsigmoid(normal(generator, *shape))
    weights = {
        "norm_weight": 1 + 0.3 * normal(generator, HEADS, WIDTH),
        "norm_bias": 0.3 * normal(generator, HEADS, WIDTH),
    }
    return tokens, weights


def memory(generator: torch.Generator, documents: int, *, depth: int) -> Memory:
    """Every matrix another: a mini-batch that has begun has left its start."""
    shape = (documents, HEADS, depth)
    return normal(generator, *shape, 2, WIDTH, WIDTH), normal(generator, *shape, WIDTH, WIDTH)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("lengths", "packed", "chunk", "offset"), GRIDS)
def test_mini_batches_give_what_tokens_give(depth, lengths, packed, chunk, offset):
    """Where the offset is 0 the gradient of the starts is 0: no mini-batch has begun."""
    definition = functools.partial(loop, offset=offset, chunk=chunk)
    case = Case(titans, definition, draw, functools.partial(memory, depth=depth))
    check(case, lengths, packed=packed, chunk=chunk, offset=offset)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cut", [1, 4, 6, 8, 10])
def test_a_sequence_cut_anywhere_goes_on_as_the_whole(cut, depth):
    """Outputs, the last memories and the gradients of what came before the cut; bitwise at mini-batches."""
    generator, length, chunk = torch.Generator().manual_seed(0), 11, 4
    tokens, weights = draw(generator, 2, length)
    first, start = memory(generator, 2, depth=depth)
    results = []
    for bounds in ((0, length), (0, cut, length)):
        xs = leaves([*tokens.values(), first])
        state, outputs = (xs[-1], torch.full_like(start, torch.nan)), []
        for begin, end in itertools.pairwise(bounds):
            piece = {name: x[:, begin:end] for name, x in zip(tokens, xs, strict=False)}
            layout = PackedLayout.uniform(2, end - begin, chunk, offset=begin % chunk)
            y, state = titans(piece, weights, state, layout)
            outputs.append(y)
        loss = torch.cat(outputs, dim=1).square().sum() + sum(x.square().sum() for x in state)
        results.append(([torch.cat(outputs, dim=1), *state], torch.autograd.grad(loss, xs)))
    (whole, gradients), (pieces, theirs) = results
    if cut % chunk == 0:
        assert all(torch.equal(*pair) for pair in zip(whole, pieces, strict=True))
    torch.testing.assert_close(pieces, whole, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(theirs, gradients, atol=1e-9, rtol=1e-9)


def test_gates_that_close_overflow_nowhere():
    """Exponents of -80 a token: nothing is divided by their products."""
    tokens, weights = draw(torch.Generator().manual_seed(0), 1, 8)
    tokens = {name: x.float() for name, x in tokens.items()}
    closed = torch.full_like(tokens["step"], -80.0)
    tokens |= {name: closed.clone().requires_grad_() for name in ("log_keep", "log_momentum")}
    state = tuple(x.float() for x in memory(torch.Generator().manual_seed(1), 1, depth=2))
    y, final = titans(tokens, weights, state, PackedLayout.uniform(1, 8, 8))
    gates = (tokens["log_keep"], tokens["log_momentum"])
    found = torch.autograd.grad(y.sum() + sum(x.sum() for x in final), gates)
    assert all(torch.isfinite(x).all() for x in (y, *final, *found))


def corrected_fla():
    """fla's, whose gradient of the layer norm has D g - sum g / (s D) for (D g - sum g) / (s D)."""
    from fla.ops.titans import naive

    wrong = "v_new = D * grad - grad.sum(-1, keepdim=True) / (rstd * D)"
    right = "v_new = (D * grad - grad.sum(-1, keepdim=True)) / (rstd * D)"
    names = dict(vars(naive))
    exec(inspect.getsource(naive.titans_linear).replace(wrong, right), names)
    return names["titans_linear"]


def test_the_naive_form_of_flash_linear_attention_agrees():
    """Corrected, with half our step: theirs descends the loss without its 1/2."""
    chunk, length = 4, 11
    tokens, weights = draw(torch.Generator().manual_seed(3), 2, length)
    first, start = memory(torch.Generator().manual_seed(4), 2, depth=1)
    m = first[:, :, 0, 0]
    state = (torch.stack([m, torch.zeros_like(m)], dim=2).unsqueeze(2), start)
    y, (final, _) = titans(tokens, weights, state, PackedLayout.uniform(2, length, chunk))
    q, k, v, step, log_keep, log_momentum = (tokens[name].transpose(1, 2) for name in TOKENS)
    gates = (x[..., None] for x in (step / 2, 1 - log_keep.exp(), log_momentum.exp()))
    norms = (x.float() for x in weights.values())
    theirs, last = corrected_fla()(
        *(x.float() for x in (q, k, v)), *norms, *(x.float() for x in gates), 1e-6, chunk, m.float(), True
    )
    # Theirs adds what it normalises, M q, where ours adds q: less our norm it leaves what has that norm.
    normed = (y - tokens["q"]).transpose(1, 2)
    read = theirs.double() - normed
    weight, bias = (x[:, None] for x in weights.values())
    again = torch.nn.functional.layer_norm(read, [WIDTH], eps=1e-6) * weight + bias
    torch.testing.assert_close(again, normed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.double(), final[:, :, 0, 0], atol=1e-4, rtol=1e-4)
