"""ABC and GSA: chunkwise against a loop over tokens, weighted means and fla's; extreme decays and scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.grid import Memory
from kernels.baselines.slots import bounded_memory_attention, gated_slot_attention
from tests.kernels.baselines.driver import Case, check, leaves, normal

HEADS, WIDTH, VALUES, SLOTS = 2, 4, 3, 5


def loop(tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
    """A token at a time: both memories decay by slot, are written, are read."""
    keys, values, *z = memory
    outputs = []
    for t in range(len(tokens["q"])):
        q, k, v = (tokens[name][t] for name in ("q", "k", "v"))
        if z:
            after = torch.logaddexp(z[0], tokens["scores"][t])
            decay, write = (z[0] - after).exp(), (tokens["scores"][t] - after).exp()
            z = [after]
        else:
            decay, write = tokens["log_decay"][t].exp(), tokens["write"][t]
        keys = keys * decay + torch.outer(k, write)
        values = values * decay[:, None] + torch.outer(write, v)
        outputs.append(torch.softmax(q @ keys, -1) @ values)
    return torch.stack(outputs), (keys, values, *z)


def draw(strength: float, *names: str):
    """Tokens with log decays and scores of ``strength``; a third of the decays are as strong as that."""

    def tokens(generator: torch.Generator, batch: int, length: int):
        shape = (batch, length, HEADS)
        strong = torch.rand(*shape, SLOTS, generator=generator) < 0.3
        weak = torch.nn.functional.logsigmoid(normal(generator, *shape, SLOTS))
        drawn = {
            "q": normal(generator, *shape, WIDTH),
            "k": normal(generator, *shape, WIDTH),
            "v": normal(generator, *shape, VALUES),
            "write": torch.sigmoid(normal(generator, *shape, SLOTS)),
            "log_decay": torch.where(strong, -strength, weak),
            "scores": strength * normal(generator, *shape, SLOTS),
        }
        return {name: drawn[name] for name in ("q", "k", "v", *names)}, {}

    return tokens


def memory(generator: torch.Generator, documents: int) -> Memory:
    shape = (documents, HEADS)
    return (normal(generator, *shape, WIDTH, SLOTS), normal(generator, *shape, SLOTS, VALUES))


def with_scores(generator: torch.Generator, documents: int) -> Memory:
    return (*memory(generator, documents), normal(generator, documents, HEADS, SLOTS))


CASES = {
    "gsa": Case(gated_slot_attention, loop, draw(1.0, "write", "log_decay"), memory),
    "gsa, e^-30 a token": Case(gated_slot_attention, loop, draw(30.0, "write", "log_decay"), memory),
    "abc": Case(bounded_memory_attention, loop, draw(1.0, "scores"), with_scores),
    "abc, scores of e^30": Case(bounded_memory_attention, loop, draw(30.0, "scores"), with_scores),
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


def means(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """ABC as its paper says it: softmax attention over slots that hold means, all at once."""
    weight = scores.exp()
    total = weight.cumsum(1)[..., None]
    keys = (weight[..., None] * k[..., None, :]).cumsum(1) / total
    values = (weight[..., None] * v[..., None, :]).cumsum(1) / total
    p = torch.einsum("bthd,bthmd->bthm", q, keys).softmax(-1)
    return torch.einsum("bthm,bthmv->bthv", p, values)


def empty(documents: int, dtype: torch.dtype) -> Memory:
    keys, values, z = (torch.zeros_like(x, dtype=dtype) for x in with_scores(torch.Generator(), documents))
    return keys, values, z - torch.inf


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_the_first_token_is_exact_and_slots_hold_weighted_means(chunk):
    tokens, _ = CASES["abc"].draw(torch.Generator().manual_seed(1), 2, 10)
    results = []
    for form in ("ours", "means"):
        xs = dict(zip(tokens, leaves(list(tokens.values())), strict=True))
        if form == "ours":
            layout = PackedLayout.uniform(2, 10, chunk)
            y, _ = bounded_memory_attention(xs, {}, empty(2, torch.float64), layout)
        else:
            y = means(**xs)
        direction = normal(torch.Generator().manual_seed(2), *y.shape)
        results.append([y, *torch.autograd.grad((y * direction).sum(), list(xs.values()))])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-11)
    first = results[0][0][:, 0]
    torch.testing.assert_close(first, tokens["v"][:, 0], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", ["gsa", "abc"])
@pytest.mark.parametrize("lengths", [[16], [1, 3, 12]])
def test_extremes_overflow_nowhere(name, lengths):
    """fp32 with decays of e^-1000 and none, scores of +-1000, from an empty memory; gradients included."""
    names = ("write", "log_decay") if name == "gsa" else ("scores",)
    tokens, _ = draw(1000.0, *names)(torch.Generator().manual_seed(4), 1, 16)
    xs = dict(zip(tokens, leaves([x.float() for x in tokens.values()]), strict=True))
    memories = empty(len(lengths), torch.float32)[: 2 if name == "gsa" else 3]
    y, final = CASES[name].operation(xs, {}, memories, PackedLayout.of(tuple(lengths), 8))
    for x in (y, *final, *torch.autograd.grad(y.square().sum() + final[0].sum(), list(xs.values()))):
        assert torch.isfinite(x).all()


def test_a_decay_of_zero_forgets_all_and_leaves_no_nan():
    tokens, _ = CASES["gsa"].draw(torch.Generator().manual_seed(5), 1, 8)
    tokens["log_decay"][:, 5] = -torch.inf
    xs = dict(zip(tokens, leaves(list(tokens.values())), strict=True))
    y, _ = gated_slot_attention(xs, {}, memory(torch.Generator(), 1), PackedLayout.uniform(1, 8, 8))
    for before in torch.autograd.grad(y[:, 5:].sum(), [xs["v"], xs["k"], xs["write"]]):
        assert torch.isfinite(before).all()
        assert not before[:, :5].any()


@pytest.mark.parametrize("name", ["gsa", "abc"])
def test_the_naive_forms_of_flash_linear_attention_agree(name):
    """Theirs compute in fp32, abc's with the heads before the tokens; their memories start at zero."""
    tokens, _ = CASES[name].draw(torch.Generator().manual_seed(3), 2, 11)
    tokens = {key: x.float() for key, x in tokens.items()}
    memories = empty(2, torch.float32)[: 2 if name == "gsa" else 3]
    y, final = CASES[name].operation(tokens, {}, memories, PackedLayout.uniform(2, 11, 4))
    if name == "gsa":
        from fla.ops.gsa.naive import naive_recurrent_gsa

        ordered = [tokens[key] for key in ("q", "k", "v", "write", "log_decay")]
        theirs, last = naive_recurrent_gsa(*ordered, scale=1.0, output_final_state=True)
    else:
        from fla.ops.abc.naive import naive_recurrent_abc

        ordered = [tokens[key].transpose(1, 2) for key in ("q", "k", "v", "scores")]
        theirs, last = naive_recurrent_abc(*ordered, scale=1.0, output_final_state=True)
        theirs = theirs.transpose(1, 2)
    torch.testing.assert_close(y, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final[:2], tuple(last), atol=1e-5, rtol=1e-5)
