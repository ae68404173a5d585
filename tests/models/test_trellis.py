"""The Trellis mixer: what it hands to the operation, and the whole mixer against a token recurrence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import compress_kv
from trellis_dist.models.config import TrellisConfig
from trellis_dist.models.context import SequenceContext
from trellis_dist.models.language_model import build_language_model
from trellis_dist.models.registry import build_mixer


def recurrence(q, k, v, alpha, log_decay, step_size, *, chunk_size, S, R):
    """docs/math.md, token recurrence with phi = SiLU and f = LN-SiLU; all inputs [B, T, H, .]."""
    outputs = []
    for t in range(q.shape[1]):
        if t % chunk_size == 0:
            stale_S, stale_R = S, R
        u, w = gradient(stale_S, k[:, t], alpha[:, t]), gradient(stale_R, v[:, t], alpha[:, t])
        beta, gamma = log_decay[:, t, :, None, None].exp(), step_size[:, t, :, None, None]
        S = beta * S - gamma * u[..., None] * k[:, t, :, None]
        R = beta * R - gamma * w[..., None] * v[:, t, :, None]
        read = F.silu(apply(S, q[:, t]))
        read = F.layer_norm(read, read.shape[-1:], eps=1e-5)
        outputs.append(torch.einsum("bhmv,bhm->bhv", R, read))
    return torch.stack(outputs, dim=1)


def gradient(memory, x, alpha):
    z = apply(memory, x)
    sigma = torch.sigmoid(z)
    return sigma * (1 + z * (1 - sigma)) * (F.silu(z) - alpha)


def corrected_recurrence(
    q, k, v, alpha, log_decay, step_size, value_log_decay, value_step_size, *, chunk_size, affine
):
    """The corrected update with phi = tanh, gates of its own for the value pass, and f = silu_rms."""
    shape = (*alpha.shape[:1], *alpha.shape[2:], q.shape[-1])
    memories, starts = [torch.zeros(shape, dtype=q.dtype)] * 2, [None, None]
    gates, outputs = ((log_decay, step_size), (value_log_decay, value_step_size)), []
    for t in range(q.shape[1]):
        for i, (x, (decay, step)) in enumerate(zip((k[:, t], v[:, t]), gates)):
            beta, gamma = decay[:, t, :, None, None].exp(), step[:, t, :, None, None]
            start = beta * (memories[i] if t % chunk_size == 0 else starts[i])
            kept, z = beta * memories[i], apply(start, x)
            u = (1 - z.tanh() ** 2) * (z.tanh() - alpha[:, t]) + apply(kept, x) - z
            memories[i], starts[i] = kept - gamma * u[..., None] * x[..., None, :], start
        read = apply(memories[0], q[:, t])
        unit = read / (read.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        read = F.silu(affine[0] * unit + affine[1])
        outputs.append(torch.einsum("bhmv,bhm->bhv", memories[1], read))
    return torch.stack(outputs, dim=1)


def apply(memory, x):
    return torch.einsum("bhmd,bhd->bhm", memory, x)


OWN_GATES = ("value_log_decay", "value_step_size")


class Spy:
    """Stands in for the operation and keeps what it was given."""

    def __call__(self, q, k, v, alpha, log_decay, step_size, **settings):
        self.inputs = {"q": q, "k": k, "v": v, "alpha": alpha, "log_decay": log_decay, "step_size": step_size}
        self.inputs |= {name: settings.pop(name) for name in list(settings) if name in OWN_GATES}
        self.settings = settings
        return v.clone(), None


def handed(model, rows=2, length=9):
    """What the first layer's operation receives for random activations."""
    mixer = model.blocks[0].mixer
    mixer.operation = Spy()
    dtype = model.embedding_weight.dtype
    x = torch.randn(rows, length, model.config.dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixer(x, SequenceContext())
    return mixer.operation


@pytest.mark.parametrize("learned_start", [False, True])
def test_mixer_equals_the_token_recurrence(tiny, learned_start):
    model = tiny(
        trellis={"learned_initial_memory": learned_start, "step_bound": "token", "step_size_max": 0.5}
    )
    mixer = model.blocks[0].mixer
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = mixer(x, SequenceContext())
    S = R = torch.zeros(2, 2, 6, 8, dtype=torch.float64)
    if learned_start:
        S, R = (
            memory.expand(2, -1, -1, -1) for memory in (mixer.initial_key_memory, mixer.initial_value_memory)
        )

    def operation(*, chunk_size, phi, readout, update, initial_state, layout, **inputs):
        return recurrence(**inputs, chunk_size=chunk_size, S=S, R=R), None

    mixer.operation = operation
    torch.testing.assert_close(ours, mixer(x, SequenceContext()), atol=1e-10, rtol=1e-10)


CORRECTED = {
    "update": "corrected",
    "phi": "tanh",
    "readout": "silu_rms",
    "value_gates": "own",
    "step_bound": "token",
    "step_size_max": 1.0,
}


def test_mixer_equals_the_corrected_recurrence(tiny):
    mixer = tiny(trellis=CORRECTED).blocks[0].mixer
    with torch.no_grad():
        mixer.readout_weight += torch.linspace(-1, 1, 12)
        mixer.readout_bias += torch.linspace(-2, 1, 12)
        mixer.value_decay_bias -= 3
    x = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = mixer(x, SequenceContext())

    def operation(*, readout_weight, readout_bias, chunk_size, phi, readout, update, **inputs):
        assert (phi, readout, update) == ("tanh", "silu_rms", "corrected")
        inputs = {name: inputs[name] for name in inputs if name not in ("initial_state", "layout")}
        affine = (readout_weight, readout_bias)
        return corrected_recurrence(**inputs, chunk_size=chunk_size, affine=affine), None

    mixer.operation = operation
    torch.testing.assert_close(ours, mixer(x, SequenceContext()), atol=1e-10, rtol=1e-10)


def test_queries_keys_and_values_have_unit_norm(tiny):
    inputs = handed(tiny()).inputs
    for name in ("q", "k", "v"):
        norms = inputs[name].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)
    alpha = inputs["alpha"]
    assert alpha.shape == (2, 9, 2, 6)
    torch.testing.assert_close(alpha.square().mean(-1), torch.ones(2, 9, 2).double(), atol=1e-3, rtol=0)


def test_raw_values_and_targets_are_options(tiny):
    inputs = handed(tiny(trellis={"value_norm": "none", "alpha_norm": "none"})).inputs
    assert inputs["v"].norm(dim=-1).std() > 0.1
    assert inputs["alpha"].square().mean(-1).std() > 0.1


def test_without_the_activation_queries_are_the_normalised_convolution(tiny):
    model = tiny(trellis={"conv_activation": "none", "conv_kernel": 0})
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixer = model.blocks[0].mixer
    q = mixer._inputs(mixer._project(x))["q"]
    expected = torch.nn.functional.normalize((x @ mixer.q_weight.t()).unflatten(-1, (2, 8)), dim=-1)
    torch.testing.assert_close(q, expected, atol=1e-3, rtol=0)
    assert (q < 0).any()


@pytest.mark.parametrize("gate, expected", [("off", 0.0), ("fixed", -math.log1p(math.exp(-2.0)))])
def test_gates_that_are_not_learned(tiny, gate, expected):
    model = tiny(trellis={"gates": (gate,), "gate_bias": 2.0})
    log_decay = handed(model).inputs["log_decay"]
    torch.testing.assert_close(log_decay, torch.full((2, 9, 2), expected, dtype=torch.float64))
    assert not any("decay" in name for name, _ in model.named_parameters())


def test_gates_cycle_over_the_layers(tiny):
    model = tiny(num_layers=3, trellis={"gates": ("learned", "off")})
    assert [block.mixer.gate for block in model.blocks] == ["learned", "off", "learned"]


@pytest.mark.parametrize("bound, largest", [("chunk", 2.0 / 4), ("token", 2.0)])
def test_steps_are_bounded(tiny, bound, largest):
    step_size = handed(tiny(trellis={"step_bound": bound}, init_std=5.0)).inputs["step_size"]
    assert 0 <= step_size.min() < 0.1 * largest
    assert 0.9 * largest < step_size.max() <= largest


def test_operation_gets_the_models_settings(tiny):
    settings = handed(tiny(trellis={"phi": "tanh", "readout": "softmax"})).settings
    assert settings == {
        "chunk_size": 4,
        "phi": "tanh",
        "readout": "softmax",
        "update": "stale",
        "initial_state": None,
        "layout": None,
    }


def test_value_gates_are_the_key_gates_unless_they_are_its_own(tiny):
    assert not set(handed(tiny()).inputs) & set(OWN_GATES)
    model = tiny(trellis={"value_gates": "own", "step_size_bias": -1.0})
    inputs = handed(model).inputs
    for own, shared, largest in (
        ("value_log_decay", "log_decay", 0.0),
        ("value_step_size", "step_size", 0.5),
    ):
        assert inputs[own].shape == inputs[shared].shape
        assert inputs[own].max() <= largest
        assert not torch.isclose(inputs[own], inputs[shared]).any()
    names = {name.rpartition(".")[2] for name, _ in model.blocks[0].named_parameters()}
    assert {"value_step_weight", "value_step_bias", "value_decay_weight", "value_decay_bias"} <= names


@pytest.mark.parametrize("gate", ["fixed", "off"])
def test_a_forget_gate_that_is_not_learned_is_the_same_for_both_passes(tiny, gate):
    model = tiny(trellis={"value_gates": "own", "gates": (gate,)})
    inputs = handed(model).inputs
    assert "value_step_size" in inputs
    assert "value_log_decay" not in inputs
    assert not any("decay" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("options", [{"readout": "silu_rms"}, {"readout": "silu"}, {"readout_affine": True}])
def test_the_affine_is_learned_and_starts_as_none(tiny, options):
    settings = handed(tiny(trellis=options)).settings
    assert torch.equal(settings["readout_weight"], torch.ones(2, 6).double())
    assert torch.equal(settings["readout_bias"], torch.zeros(2, 6).double())
    assert "readout_weight" not in handed(tiny()).settings


def test_what_is_small_beside_the_norm_of_the_heads_stays_small(tiny):
    mixer = tiny(trellis={"head_norm_eps": 0.25}).blocks[0].mixer
    y = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate = torch.full((2, 3, 16), 3.0, dtype=torch.float64)
    for size in (1e-3, 1.0):
        unit = size * y / ((size * y).square().mean(-1, keepdim=True) + 0.25).sqrt()
        expected = (unit.flatten(-2) * F.gelu(gate)) @ mixer.out_weight.T
        torch.testing.assert_close(mixer._output(size * y, y, gate), expected, atol=1e-12, rtol=1e-9)


def test_a_token_s_own_value_is_added_to_what_its_head_reads(tiny, tokens):
    plain, skipping = tiny().blocks[0].mixer, tiny(trellis={"skip_values": True}).blocks[0].mixer
    assert torch.equal(skipping.skip, torch.ones(2, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 2, 3, 2, 8, generator=generator, dtype=torch.float64)
    gate = torch.full((2, 3, 16), 3.0, dtype=torch.float64)
    with torch.no_grad():
        skipping.skip.copy_(torch.tensor([0.5, -2.0]))
    expected = plain._output(y + torch.tensor([0.5, -2.0]).double()[:, None] * v, y, gate)
    torch.testing.assert_close(skipping._output(y, v, gate), expected, atol=1e-12, rtol=1e-12)


def test_a_fresh_affine_changes_nothing(tiny, tokens):
    x = tokens(2, 9)
    model, plain = tiny(trellis={"readout_affine": True}), tiny()
    torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        model.blocks[1].mixer.readout_bias[:6] += 1  # of the first head
    assert not torch.allclose(model(x), plain(x), atol=1e-3)


def test_layers_share_one_layout(tiny, tokens):
    model = tiny(num_layers=3)
    for block in model.blocks:
        block.mixer.operation = Spy()
    model(tokens(1, 12), cu_seqlens=torch.tensor([0, 5, 12]))
    first, *others = [block.mixer.operation.settings["layout"] for block in model.blocks]
    assert first is not None
    assert all(layout is first for layout in others)


def test_half_precision_keeps_gates_in_fp32(tiny, tokens):
    inputs = handed(tiny(dtype=torch.bfloat16)).inputs
    assert inputs["q"].dtype == inputs["alpha"].dtype == torch.bfloat16
    assert inputs["log_decay"].dtype == inputs["step_size"].dtype == torch.float32


def test_half_precision_model_is_close_to_fp32(config, tokens):
    options = {"dim": 32, "init_std": 0.1, "pattern": ("trellis", "attention")}
    models = [
        build_language_model(config(**options), seed=0, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    x, labels = tokens(2, 20), tokens(2, 20, seed=1)
    wide, narrow = (model.loss_sum(x, labels) for model in models)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=0.02)
    narrow.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in models[1].parameters())
    _, state = models[1].prefill(x, models[1].init_state(2))
    assert state.layers[0].memory.key_memory.dtype == torch.float32
    logits, _ = models[1].decode_step(x[:, 0], state)
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, CORRECTED, {"readout_affine": True}])
def test_every_parameter_gets_a_gradient(tiny, tokens, options):
    options = {"learned_initial_memory": True, **options}
    model = tiny(pattern=("trellis", "attention"), tie_embeddings=False, trellis=options)
    model.loss_sum(tokens(2, 13), tokens(2, 13, seed=1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_unknown_mixer_is_refused(config):
    with pytest.raises(ValueError, match=r"known layer kinds are .*attention.*trellis"):
        build_mixer("mamba", config(), 0)


def test_overfits_a_small_batch(config, tokens):
    model = build_language_model(config(dim=32, init_std=0.1), seed=0)
    x = tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss_sum(x[:, :-1], x[:, 1:].contiguous()) / (4 * 24)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_a_gate_with_a_floor_never_falls_below_it(tiny):
    """beta = floor + (1 - floor) sigmoid(z), also where sigmoid(z) is 0 in fp64."""
    plain, floored = (tiny(trellis={"gate_floor": floor, "gate_bias": 0.0}) for floor in (0.0, 0.9))
    plain_decay, decay = (handed(model).inputs["log_decay"] for model in (plain, floored))
    torch.testing.assert_close(decay.exp(), 0.9 + 0.1 * plain_decay.exp(), atol=1e-12, rtol=0)
    with torch.no_grad():
        floored.blocks[0].mixer.decay_bias -= 2000
    lowest = handed(floored).inputs["log_decay"]
    torch.testing.assert_close(lowest.exp(), torch.full_like(lowest, 0.9), atol=1e-12, rtol=0)


def test_gates_as_rates(tiny):
    """log beta = -exp(A) softplus(z); heads begin with rates between those of .001 and 16 * .1 per token."""
    model = tiny(trellis={"gate_form": "rate", "value_gates": "own"}, num_heads=8, init_std=1e-9)
    mixer, inputs = model.blocks[0].mixer, handed(model).inputs
    for prefix in ("", "value_"):
        rate, bias = (getattr(mixer, f"{prefix}decay_{name}") for name in ("rate", "bias"))
        expected = -rate.exp() * torch.log1p(bias.exp())
        torch.testing.assert_close(inputs[f"{prefix}log_decay"][0, 0], expected, atol=1e-6, rtol=1e-6)
        assert bool(((expected < -0.00099) & (expected > -1.61)).all())
        assert len(expected.unique()) == 8, "every head draws its own"
    assert not torch.equal(inputs["log_decay"], inputs["value_log_decay"])


def test_values_are_convolved_when_asked(tiny):
    """The last taps alone give the values that no convolution gives, up to the SiLU behind them."""
    model = tiny(trellis={"conv_values": True, "conv_activation": "none", "value_norm": "none"})
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.v_conv_weight.zero_()[:, -1] = 1
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
    expected = (x @ mixer.v_weight.T).unflatten(-1, (2, 8))
    torch.testing.assert_close(handed(model).inputs["v"], expected, atol=1e-10, rtol=0)
    with torch.no_grad():
        mixer.v_conv_weight[:, -2] = 1
    before = torch.nn.functional.pad(expected, (0, 0, 0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(handed(model).inputs["v"], expected + before, atol=1e-10, rtol=0)


def test_targets_are_convolved_when_asked(tiny):
    """The last taps alone give the targets that no convolution gives; SiLU and the norm come after them."""
    options = {"conv_targets": True, "alpha_norm": "none"}
    mixer = (model := tiny(trellis=options)).blocks[0].mixer
    with torch.no_grad():
        mixer.alpha_conv_weight.zero_()[:, -1] = 1
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
    projected = (x @ mixer.alpha_weight.T).unflatten(-1, (2, -1))
    expected = torch.nn.functional.silu(projected)
    torch.testing.assert_close(handed(model).inputs["alpha"], expected, atol=1e-10, rtol=0)
    with torch.no_grad():
        mixer.alpha_conv_weight[:, -2] = 1
    before = torch.nn.functional.pad(projected, (0, 0, 0, 0, 1, 0))[:, :-1]
    expected = torch.nn.functional.silu(projected + before)
    torch.testing.assert_close(handed(model).inputs["alpha"], expected, atol=1e-10, rtol=0)


def test_targets_that_values_cannot_be_are_refused(tiny):
    with pytest.raises(ValueError, match="slots = 6 and heads of width 8"):
        tiny(trellis={"targets": "values"})
    assert tiny(pattern=("attention",), trellis={"targets": "values"}).config.trellis.slots == 6


@pytest.mark.parametrize("convolved", [False, True])
def test_values_are_targets_before_their_norm(tiny, convolved):
    """No weight of alpha's; v, convolved or not, of whatever size, is what the key pass stores."""
    options = {"targets": "values", "slots": 8, "alpha_norm": "none", "conv_values": convolved}
    model = tiny(trellis=options)
    assert not any("alpha" in name for name, _ in model.named_parameters())
    raw = handed(tiny(trellis={**options, "value_norm": "none"})).inputs["v"]
    inputs = handed(model).inputs
    torch.testing.assert_close(inputs["alpha"], raw, atol=0, rtol=0)
    torch.testing.assert_close(inputs["v"], F.normalize(raw, dim=-1), atol=1e-5, rtol=1e-5)
    normed = handed(tiny(trellis={**options, "alpha_norm": "rms"})).inputs["alpha"]
    torch.testing.assert_close(normed, F.rms_norm(raw, (8,), eps=1e-6), atol=1e-9, rtol=0)


def test_the_value_pass_begins_from_biases_of_its_own(tiny):
    options = {"value_gates": "own", "gate_bias": 2.0, "value_gate_bias": 7.0, "value_step_size_bias": -3.0}
    inputs = handed(tiny(trellis=options, init_std=1e-12)).inputs
    for name, bias in (("log_decay", 2.0), ("value_log_decay", 7.0)):
        expected = torch.full_like(inputs[name], bias).sigmoid()
        torch.testing.assert_close(inputs[name].exp(), expected, atol=1e-9, rtol=0)
    rates = handed(tiny(trellis={**options, "gate_form": "rate"}, init_std=1e-12)).inputs
    assert torch.equal(rates["value_log_decay"], inputs["value_log_decay"]), "a bias makes it a sigmoid"
    assert not torch.equal(rates["log_decay"], inputs["log_decay"])
    ratio = inputs["value_step_size"] / inputs["step_size"]
    expected = torch.full_like(ratio, -3.0).sigmoid() / 0.5
    torch.testing.assert_close(ratio, expected, atol=1e-9, rtol=0)


def test_an_identity_to_begin_with_reads_the_key_pass_itself(tiny):
    """R = I and nothing written by the value pass: y = f(S q), whatever v is."""
    options = {"learned_initial_memory": True, "initial_value_memory": "identity", "slots": 8}
    model = tiny(
        trellis={**options, "value_gates": "own", "value_gate_bias": 60.0, "value_step_size_bias": -60.0}
    )
    mixer, inputs = model.blocks[0].mixer, handed(model).inputs
    state = mixer._first_memory(2)
    assert torch.equal(state.value_memory[1, 0], torch.eye(8, dtype=torch.float64))
    settings = {"chunk_size": mixer.options.chunk_size, "phi": "silu"}
    y, final = compress_kv(**inputs, **settings, initial_state=state, output_final_state=True)
    torch.testing.assert_close(final.value_memory, state.value_memory, atol=1e-9, rtol=0)
    last = apply(final.key_memory, inputs["q"][:, -1])
    expected = F.layer_norm(F.silu(last), last.shape[-1:], eps=1e-5)
    torch.testing.assert_close(y[:, -1], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_values": True, "conv_kernel": 0}, "conv_values"),
        ({"conv_targets": True, "conv_kernel": 0}, "conv_targets"),
        ({"targets": "values", "conv_targets": True}, "conv_targets"),
        ({"value_gate_bias": 8.0}, "value_gates"),
        ({"value_step_size_bias": 0.0}, "value_gates"),
        ({"value_gates": "own", "value_gate_bias": 8.0, "gates": ("off",)}, "value_gate_bias"),
        ({"initial_value_memory": "identity"}, "learned_initial_memory"),
        ({"gate_floor": 1.0}, "gate_floor"),
        ({"gate_form": "rate", "gate_floor": 0.5}, "gate_form"),
        ({"gate_form": "rate", "gates": ("fixed",)}, "gate_form"),
    ],
)
def test_gates_and_convolutions_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrellisConfig(**options)
