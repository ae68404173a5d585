"""RWKV-7's rule: chunkwise against a loop over tokens, the delta rule and fla's; decays at extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.delta_rule import gated_delta_rule
from kernels.baselines.grid import Memory
from kernels.baselines.rwkv7 import generalised_delta_rule
from tests.kernels.baselines.driver import Case, check, leaves, normal, unit

HEADS, WIDTH, VALUES = 2, 4, 3


def loop(tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
    """S (diag(w) - h (a o h)^T) + v k^T, S [V, D] as in the paper, a token at a time."""
    state = memory[0].T
    outputs = []
    for t in range(len(tokens["q"])):
        q, k, v, key, rate = (tokens[name][t] for name in ("q", "k", "v", "key", "rate"))
        change = torch.diag(tokens["log_decay"][t].exp()) - torch.outer(key, rate * key)
        state = state @ change + torch.outer(v, k)
        outputs.append(state @ q)
    return torch.stack(outputs), (state.T,)


def draw(strength: float):
    """A third of the log decays are -``strength``."""

    def tokens(generator: torch.Generator, batch: int, length: int):
        shape = (batch, length, HEADS)
        strong = torch.rand(*shape, WIDTH, generator=generator) < 0.3
        weak = torch.nn.functional.logsigmoid(normal(generator, *shape, WIDTH))
        drawn = {
            "q": normal(generator, *shape, WIDTH),
            "k": normal(generator, *shape, WIDTH),
            "v": normal(generator, *shape, VALUES),
            "key": unit(generator, *shape, WIDTH),
            "rate": torch.sigmoid(normal(generator, *shape, WIDTH)),
            "log_decay": torch.where(strong, -strength, weak),
        }
        return drawn, {}

    return tokens


def memory(generator: torch.Generator, documents: int) -> Memory:
    return (normal(generator, documents, HEADS, WIDTH, VALUES),)


CASES = {
    "rwkv7": Case(generalised_delta_rule, loop, draw(0.6), memory),
    "e^-30 a token": Case(generalised_delta_rule, loop, draw(30.0), memory),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("lengths", "packed", "chunk"),
    [
        ([8, 8], False, 4),
        ([7, 7], False, 4),
        ([1, 9, 4, 2], True, 4),
        ([5], False, 1),
        ([3], False, 8),
        ([26], False, 13),
    ],
)
def test_chunks_give_what_tokens_give(name, lengths, packed, chunk):
    check(CASES[name], lengths, packed=packed, chunk=chunk)


def test_one_decay_and_one_rate_of_a_head_give_gated_deltanet():
    """Decay w, rate w b along h = k, and b k put in: w (I - b k k^T) S + b k v^T."""
    generator = torch.Generator().manual_seed(1)
    tokens, _ = draw(0.6)(generator, 2, 11)
    decay, beta = (torch.sigmoid(normal(generator, 2, 11, HEADS)) for _ in range(2))
    scalars = {"log_decay": decay.log(), "beta": beta}
    layout, memories = PackedLayout.uniform(2, 11, 4), memory(generator, 2)
    theirs = {"q": tokens["q"], "k": tokens["key"], "v": tokens["v"], **scalars}
    expected, last = gated_delta_rule(theirs, {}, memories, layout)
    wide = {name: x[..., None].expand_as(tokens["key"]) for name, x in scalars.items()}
    ours = {
        **tokens,
        "k": wide["beta"] * tokens["key"],
        "rate": wide["beta"] * wide["log_decay"].exp(),
        "log_decay": wide["log_decay"],
    }
    y, final = generalised_delta_rule(ours, {}, memories, layout)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(final, last, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("lengths", [[32], [1, 7, 24]])
def test_extremes_overflow_nowhere(lengths):
    """fp32 with decays of e^-1000 and none, and one key again and again; gradients included."""
    tokens, _ = draw(1000.0)(torch.Generator().manual_seed(4), 1, 32)
    tokens["log_decay"] = torch.where(tokens["log_decay"] < -999, -1000.0, 0.0)
    tokens["key"] = tokens["key"][:, :1].expand_as(tokens["key"])
    xs = dict(zip(tokens, leaves([x.float() for x in tokens.values()]), strict=True))
    memories = tuple(x.float() for x in memory(torch.Generator().manual_seed(5), len(lengths)))
    y, final = generalised_delta_rule(xs, {}, memories, PackedLayout.of(tuple(lengths), 16))
    for x in (y, *final, *torch.autograd.grad(y.square().sum() + final[0].sum(), list(xs.values()))):
        assert torch.isfinite(x).all()


def test_the_naive_form_of_flash_linear_attention_agrees():
    """Theirs computes in fp32, with the heads before the tokens, and scales q by D^-1/2."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    tokens, _ = CASES["rwkv7"].draw(torch.Generator().manual_seed(3), 2, 11)
    tokens = {key: x.float() for key, x in tokens.items()}
    state = torch.zeros(2, HEADS, WIDTH, VALUES)
    y, (final,) = generalised_delta_rule(tokens, {}, (state,), PackedLayout.uniform(2, 11, 4))
    first = {key: x.transpose(1, 2) for key, x in tokens.items()}
    theirs, last = dplr_recurrence(
        first["q"] * WIDTH**0.5,
        first["k"],
        first["v"],
        alpha=-first["key"],
        beta=first["key"] * first["rate"],
        gk=first["log_decay"],
    )
    torch.testing.assert_close(y, theirs.transpose(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, last, atol=1e-5, rtol=1e-5)
