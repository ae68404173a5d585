"""Linear attention, the delta rule, their decays: chunkwise against a loop over tokens and against fla's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.delta_rule import gated_delta_rule
from kernels.baselines.grid import Memory
from kernels.baselines.linear_attention import decayed_linear_attention
from tests.kernels.baselines.driver import Case, check, normal, unit

HEADS, WIDTH, VALUES = 2, 4, 3


def loop(tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
    """S_t = a_t S_{t-1} + b_t k_t (v_t - erase * (a_t S_{t-1})^T k_t)^T, a token at a time."""
    (state,) = memory
    outputs = []
    for t in range(len(tokens["q"])):
        q, k, v = (tokens[name][t] for name in ("q", "k", "v"))
        if "log_decay" in tokens:
            state = state * tokens["log_decay"][t].exp()
        if "beta" in tokens:
            v = tokens["beta"][t] * (v - k @ state)
        state = state + torch.outer(k, v)
        outputs.append(q @ state)
    return torch.stack(outputs), (state,)


def draw(*names: str):
    def tokens(generator: torch.Generator, batch: int, length: int):
        shape = (batch, length, HEADS)
        drawn = {
            "q": normal(generator, *shape, WIDTH),
            "k": unit(generator, *shape, WIDTH),
            "v": normal(generator, *shape, VALUES),
            "beta": torch.sigmoid(normal(generator, *shape)),
            "log_decay": torch.nn.functional.logsigmoid(normal(generator, *shape)),
        }
        return {name: drawn[name] for name in ("q", "k", "v", *names)}, {}

    return tokens


def memory(generator: torch.Generator, documents: int) -> Memory:
    return (normal(generator, documents, HEADS, WIDTH, VALUES),)


CASES = {
    "linear attention": Case(decayed_linear_attention, loop, draw(), memory),
    "decayed": Case(decayed_linear_attention, loop, draw("log_decay"), memory),
    "delta rule": Case(gated_delta_rule, loop, draw("beta"), memory),
    "gated delta rule": Case(gated_delta_rule, loop, draw("beta", "log_decay"), memory),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("lengths", "packed", "chunk"),
    [([8, 8], False, 4), ([7, 7], False, 4), ([1, 9, 4, 2], True, 4), ([5], False, 1), ([3], False, 8)],
)
def test_chunks_give_what_tokens_give(name, lengths, packed, chunk):
    check(CASES[name], lengths, packed=packed, chunk=chunk)


def test_a_vanishing_decay_overflows_nowhere():
    """Exponents of -80 a token: masked before they are taken, so no NaN and a finite gradient."""
    tokens, _ = draw("beta", "log_decay")(torch.Generator().manual_seed(0), 1, 8)
    tokens = {name: x.float() for name, x in tokens.items()}
    tokens["log_decay"] = torch.full_like(tokens["log_decay"], -80.0).requires_grad_()
    for operation in (gated_delta_rule, decayed_linear_attention):
        y, _ = operation(tokens, {}, (torch.ones(1, HEADS, WIDTH, VALUES),), PackedLayout.uniform(1, 8, 8))
        (gradient,) = torch.autograd.grad(y.sum(), tokens["log_decay"])
        assert torch.isfinite(y).all()
        assert torch.isfinite(gradient).all()


def fla_linear_attention(tokens: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    y, last = naive_recurrent_linear_attn(
        **tokens, scale=1.0, initial_state=state, output_final_state=True, normalize=False
    )
    return y, last


def fla_decayed(tokens: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    q, k, v, g = (tokens[key] for key in ("q", "k", "v", "log_decay"))
    return naive_recurrent_simple_gla(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)


def fla_delta_rule(tokens: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Heads before tokens, and always q / sqrt(D)."""
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k, v, beta = (tokens[key].transpose(1, 2) for key in ("q", "k", "v", "beta"))
    y, last = delta_rule_recurrence(q * WIDTH**0.5, k, v, beta, initial_state=state)
    return y.transpose(1, 2), last


def fla_gated_delta_rule(tokens: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    q, k, v, beta, g = (tokens[key] for key in ("q", "k", "v", "beta", "log_decay"))
    return naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, scale=1.0, initial_state=state, output_final_state=True
    )


FLA = {
    "linear attention": ((), fla_linear_attention),
    "decayed": (("log_decay",), fla_decayed),
    "delta rule": (("beta",), fla_delta_rule),
    "gated delta rule": (("beta", "log_decay"), fla_gated_delta_rule),
}


@pytest.mark.parametrize("name", CASES)
def test_the_naive_forms_of_flash_linear_attention_agree(name):
    """Theirs compute in fp32."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed here")
    names, form = FLA[name]
    generator = torch.Generator().manual_seed(3)
    tokens = {key: x.float() for key, x in draw(*names)(generator, 2, 11)[0].items()}
    state = normal(generator, 2, HEADS, WIDTH, VALUES).float()
    y, (final,) = CASES[name].operation(tokens, {}, (state,), PackedLayout.uniform(2, 11, 4))
    theirs, last = form(tokens, state)
    torch.testing.assert_close(y, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final, last, atol=1e-5, rtol=1e-5)
