"""Every baseline's mixer against the formulas that its file opens with, and what its weights start from.

Written once more in plain torch, a head and a token at a time: nothing here calls what the mixers call. The
recurrences are the loops that tests/kernels/baselines hold the chunkwise forms to.

Shapes: B rows, T tokens, H heads, D = head width; x [B, T, dim], what a head has of it [B, T, H, width].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.baselines.driver import Case, Definition, by_definition
from tests.kernels.baselines.test_linear import loop as linear_loop
from tests.kernels.baselines.test_rwkv7 import loop as rwkv7_loop
from tests.kernels.baselines.test_slots import loop as slots_loop
from tests.kernels.baselines.test_titans import loop as titans_loop
from tests.kernels.baselines.test_ttt import loop as ttt_loop
from trellis_dist.models.baseline_config import BASELINES, READERS
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.init import Constant, InverseSoftplus, LogUniform, Normal, Ramp

ROWS, LENGTH, HEADS, WIDTH, SLOTS, MINI_BATCH = 2, 11, 2, 8, 5, 4
STD, LAYERS = 0.3, 2
Given = dict[str, Tensor]
# (what is projected, the parameters) -> (tokens, weights per head, the first memory of a row, of all heads)
Inputs = Callable[[Given, Given], tuple[Given, Given, tuple[Tensor, ...]]]


def heads(vector: Tensor) -> Tensor:
    return vector.reshape(HEADS, -1)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def nothing(*shape: int, fill: float = 0.0) -> Tensor:
    return torch.full((HEADS, *shape), fill, dtype=torch.float64)


def linear_attention(x: Given, p: Given) -> Any:
    return {name: x[name] for name in "qkv"}, {}, (nothing(WIDTH, WIDTH),)


def deltanet(x: Given, p: Given) -> Any:
    beta = sigmoid(x["beta"][..., 0])
    return {"q": unit(x["q"]), "k": unit(x["k"]), "v": x["v"], "beta": beta}, {}, (nothing(WIDTH, WIDTH),)


def gated_deltanet(x: Given, p: Given) -> Any:
    tokens, weights, memory = deltanet(x, p)
    log_decay = -p["rate"].exp() * softplus(x["decay"][..., 0] + p["decay_bias"])
    return {**tokens, "log_decay": log_decay}, weights, memory


def mamba2(x: Given, p: Given) -> Any:
    dt = softplus(x["step"][..., 0] + p["step_bias"])
    tokens = {"q": x["q"], "k": x["k"], "v": dt[..., None] * x["v"], "log_decay": -p["rate"].exp() * dt}
    return tokens, {}, (nothing(WIDTH, WIDTH),)


def gsa(x: Given, p: Given) -> Any:
    keep = sigmoid(x["decay"]) ** (1 / 8)
    tokens = {**{name: x[name] for name in "qkv"}, "log_decay": keep.log(), "write": 1 - keep}
    return tokens, {}, (nothing(WIDTH, SLOTS), nothing(SLOTS, WIDTH))


def abc(x: Given, p: Given) -> Any:
    tokens = {"q": x["q"] / math.sqrt(WIDTH), "k": x["k"], "v": x["v"], "scores": x["scores"]}
    return tokens, {}, (nothing(WIDTH, SLOTS), nothing(SLOTS, WIDTH), nothing(SLOTS, fill=-math.inf))


def rwkv7_keys(x: Given, p: Given) -> tuple[Tensor, Tensor]:
    """a, and the keys at which values are put in."""
    up = (p["rate_up"] @ x["rate"][..., None])[..., 0]
    a = sigmoid(heads(p["rate_bias"]) + up)
    return a, x["k"] * (1 + (a - 1) * p["replacement"])


def rwkv7(x: Given, p: Given) -> Any:
    a, k = rwkv7_keys(x, p)
    up = (p["decay_up"] @ torch.tanh(x["decay"])[..., None])[..., 0]
    log_decay = -sigmoid(heads(p["decay_bias"]) + up) / math.sqrt(math.e)
    key = unit(x["k"] * heads(p["removal"]))
    tokens = {"q": x["q"], "k": k, "v": x["v"], "key": key, "rate": a, "log_decay": log_decay}
    return tokens, {}, (nothing(WIDTH, WIDTH),)


def inner_norm(p: Given) -> Given:
    return {"norm_weight": p["inner_norm_weight"], "norm_bias": p["inner_norm_bias"]}


def ttt_linear(x: Given, p: Given) -> Any:
    step = 1.5 / WIDTH * sigmoid(x["step"][..., 0] + p["step_bias"])
    mean = 1 / torch.arange(1, MINI_BATCH + 1, dtype=torch.float64)
    weights = {**inner_norm(p), "slot_scale": (mean + p["slot_rest"]).clamp_min(0)}
    layer = torch.cat([p["initial_weight"], p["initial_bias"][:, None]], dim=1)
    return {**{name: x[name] for name in "qkv"}, "step": step}, weights, (layer, nothing(WIDTH + 1, WIDTH))


def titans(x: Given, p: Given) -> Any:
    gates = {name: sigmoid(x[name][..., 0] + p[f"{name}_bias"]) for name in ("step", "keep", "momentum")}
    tokens = {
        "q": unit(x["q"]),
        "k": unit(x["k"]),
        "v": x["v"],
        "step": 3.0 / MINI_BATCH * gates["step"],
        "log_keep": gates["keep"].log(),
        "log_momentum": gates["momentum"].log(),
    }
    layers = p["initial_layers"]
    return tokens, inner_norm(p), (torch.stack([layers, torch.zeros_like(layers)], dim=2), layers)


MINI_BATCHES = {"offset": 0, "chunk": MINI_BATCH}
KINDS: dict[str, tuple[Inputs, Definition]] = {
    "linear_attention": (linear_attention, linear_loop),
    "deltanet": (deltanet, linear_loop),
    "gated_deltanet": (gated_deltanet, linear_loop),
    "mamba2": (mamba2, linear_loop),
    "gsa": (gsa, slots_loop),
    "abc": (abc, slots_loop),
    "rwkv7": (rwkv7, rwkv7_loop),
    "ttt_linear": (ttt_linear, functools.partial(ttt_loop, **MINI_BATCHES)),
    "titans": (titans, functools.partial(titans_loop, **MINI_BATCHES)),
}


def skip(x: Given, p: Given) -> Tensor:
    return p["skip"][:, None] * x["v"] if "skip" in p else torch.zeros_like(x["v"])


# What a token adds to what it reads.
OWN: dict[str, Callable[[Given, Given], Tensor]] = {
    "mamba2": skip,
    "deltanet": skip,
    "gated_deltanet": skip,
    "rwkv7": lambda x, p: (x["q"] * p["bonus"] * rwkv7_keys(x, p)[1]).sum(-1, keepdim=True) * x["v"],
}
# What the norm per head adds to the mean square, unless an option says otherwise.
EPSILON = dict.fromkeys(("deltanet", "gated_deltanet", "rwkv7"), 1e-5 * WIDTH)


def projected(x: Tensor, p: Given, *, convolved: str) -> Given:
    """W x by head, and of those that are ``convolved`` silu of sum_j w_j x_{t-j}, or of themselves."""
    found = {}
    for name in [each.removesuffix("_weight") for each in p if each.endswith("_weight")]:
        if name.endswith("conv") or name in ("output_gate", "norm", "out", "inner_norm", "initial"):
            continue
        y = x @ p[f"{name}_weight"].T
        if name in convolved and f"{name}_conv_weight" in p:
            taps = p[f"{name}_conv_weight"].flip(-1).T
            late = [F.pad(y, (0, 0, j, 0))[:, :LENGTH] for j in range(len(taps))]
            y = sum(w * each for w, each in zip(taps, late, strict=True))
        if name in convolved:
            y = y * sigmoid(y)
        found[name] = y.unflatten(-1, (HEADS, -1))
    return found


def expected(kind: str, x: Tensor, p: Given, *, convolved: str, eps: float) -> Tensor:
    """The whole mixer: what the file of ``kind`` and that of ``RecurrentMixer`` say."""
    parts = projected(x, p, convolved=convolved)
    inputs, definition = KINDS[kind]
    tokens, weights, memory = inputs(parts, p)
    case = Case(operation=None, definition=definition, draw=None, memory=None)  # type: ignore[arg-type]
    first = tuple(each.expand(ROWS, *each.shape) for each in memory)
    y, _ = by_definition(case, tokens, weights, first, [LENGTH] * ROWS)
    if kind in OWN:
        y = y + OWN[kind](parts, p)
    mean_square = y.square().mean(-1, keepdim=True)
    normed = p["norm_weight"] * y / (mean_square + eps).sqrt()
    z = x @ p["output_gate_weight"].T
    gate = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return (normed.flatten(-2) * gate) @ p["out_weight"].T


def mixer_of(tiny: Any, kind: str, **baselines: Any) -> nn.Module:
    options = {"slots": SLOTS, "mini_batch": MINI_BATCH, "ttt_step": 1.5, "titans_step": 3.0, **baselines}
    return tiny(pattern=(kind,), num_layers=LAYERS, init_std=STD, baselines=options).blocks[1].mixer


FORMS = {
    "all convolved": ({}, "qkv"),
    "raw values": ({"conv_values": False}, "qk"),
    "no convolution": ({"conv_kernel": 0}, "qkv"),
    "no convolution, raw values": ({"conv_kernel": 0, "conv_values": False}, "qk"),
    "a skip": ({"skip_values": True}, "qkv"),
    "an epsilon": ({"head_norm_eps": 0.25}, "qkv"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_computes_the_formulas_of_its_file(tiny, kind, form):
    """Every parameter moved from where it starts, so that none of them counts as a 0 or a 1."""
    options, convolved = FORMS[form]
    mixer = mixer_of(tiny, kind, titans_depth=2, **options)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * noise(*parameter.shape)
    x = noise(ROWS, LENGTH, HEADS * WIDTH)
    ours = mixer(x, SequenceContext())
    given = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    eps = options.get("head_norm_eps", EPSILON.get(kind, 1e-6))
    theirs = expected(kind, x, given, convolved=convolved, eps=eps)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_every_baseline_is_here():
    assert set(KINDS) == set(BASELINES) == set(STARTS)


CHANGED = {
    "mini_batch": 3,
    "slots": 7,
    "ttt_step": 0.5,
    "titans_depth": 2,
    "titans_step": 1.0,
    "titans_keep_bias": 0.0,
    "titans_momentum_bias": 2.0,
    "skip_values": True,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_changes_the_layers_that_read_it_and_no_others(tiny, kind):
    assert set(CHANGED) == set(READERS)
    x = torch.randn(1, LENGTH, HEADS * WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = mixer_of(tiny, kind)(x, SequenceContext())
    for option, value in CHANGED.items():
        after = mixer_of(tiny, kind, **{option: value})(x, SequenceContext())
        assert torch.equal(before, after) == (kind not in READERS[option]), option


# As the docstrings have them.
DECAY = {"rate": LogUniform(1.0, 16.0)}
INNER_NORM = {"inner_norm_weight": Constant(1.0), "inner_norm_bias": Constant(0.0)}
STARTS: dict[str, dict[str, Any]] = {
    "linear_attention": {},
    "abc": {"scores_weight": Normal(STD)},
    "gsa": {"decay_weight": Normal(STD)},
    "deltanet": {"beta_weight": Normal(STD)},
    "gated_deltanet": {
        **DECAY,
        "beta_weight": Normal(STD),
        "decay_weight": Normal(STD),
        "decay_bias": InverseSoftplus(0.001, 0.1),
    },
    "mamba2": {
        **DECAY,
        "step_weight": Normal(STD),
        "step_bias": InverseSoftplus(0.001, 0.1),
        "skip": Constant(1.0),
    },
    "rwkv7": {
        **{f"{name}_{which}": Normal(STD) for name in ("decay", "rate") for which in ("weight", "up")},
        # 1 + (layer / (layers - 1))^0.3 in the second of two layers
        "decay_bias": Ramp(-5.5, 0.5, WIDTH, power=2.0, zigzag=2.5),
        "rate_bias": Ramp(-0.39, 0.01, WIDTH, power=1.0, zigzag=0.3),
        "removal": Ramp(0.76, 0.66, WIDTH, power=1.0, zigzag=0.0),
        "replacement": Constant(1.02),
        "bonus": Constant(-0.04),
    },
    "ttt_linear": {
        **INNER_NORM,
        "step_weight": Normal(STD),
        "step_bias": Constant(0.0),
        "slot_rest": Constant(0.0),
        "initial_weight": Normal(STD),
        "initial_bias": Constant(0.0),
    },
    "titans": {
        **INNER_NORM,
        **{f"{name}_weight": Normal(STD) for name in ("step", "keep", "momentum")},
        "step_bias": Constant(0.0),
        "keep_bias": Constant(4.0),
        "momentum_bias": Constant(0.0),
        "initial_layers": Normal(WIDTH**-0.5),
    },
}
BLOCK = {
    **{f"{name}_weight": Normal(STD) for name in ("q", "k", "v", "output_gate")},
    **{f"{name}_conv_weight": Normal(0.5) for name in "qkv"},
    "norm_weight": Constant(1.0),
    "out_weight": Normal(STD / math.sqrt(2 * LAYERS)),
}


@pytest.mark.parametrize("kind", STARTS)
def test_every_weight_starts_where_the_file_says(tiny, kind):
    starts = {name: parameter.initial for name, parameter in mixer_of(tiny, kind).named_parameters()}
    assert starts == {**BLOCK, **STARTS[kind]}


@pytest.mark.parametrize(("draw", "low", "high"), [
    (lambda shape, g: LogUniform(1.0, 16.0).draw(shape, g).exp(), 1, 16),
    (lambda shape, g: softplus(InverseSoftplus(0.001, 0.1).draw(shape, g).double()), 0.001, 0.1),
], ids=["A", "dt"])  # fmt: skip
def test_rates_and_steps_are_drawn_between_their_bounds(draw, low, high):
    drawn = draw(torch.Size([4096]), torch.Generator().manual_seed(0))
    assert low * 0.999 < drawn.min() < low * 1.05
    assert high * 0.95 < drawn.max() < high * 1.001
