"""Gates and norms that a trace sees are those of the mixer's weights and of the state."""

import pytest
import torch
import torch.nn.functional as F

from evals.figures.trace import held_open, trace, trellis_mixers
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

VOCAB, TOKENS = 40, 50


def build(*, pattern=("trellis",), **options):
    trellis = TrellisConfig(slots=8, chunk_size=8, **options)
    config = ModelConfig(
        vocab_size=VOCAB, num_layers=3, dim=16, num_heads=2, pattern=pattern, trellis=trellis
    )
    return build_language_model(config, seed=0).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB, (3, TOKENS), generator=torch.Generator().manual_seed(1))


def test_the_gate_is_that_of_the_mixers_weights(tokens):
    model = build(gate_form="sigmoid", gate_floor=0.0)
    block = model.blocks[0]
    with torch.no_grad():
        x = block.mixer_norm(F.embedding(tokens, model.embedding_weight))
        beta = torch.sigmoid(F.linear(x, block.mixer.decay_weight, block.mixer.decay_bias))
        gamma = torch.sigmoid(F.linear(x, block.mixer.step_weight, block.mixer.step_bias))
    seen = trace(model, tokens, piece=13)
    assert seen.layers == (0, 1, 2)
    assert seen.gate.shape == (3, 3, 2, TOKENS)
    torch.testing.assert_close(seen.gate[:, 0], beta.transpose(1, 2))
    largest = block.mixer.options.largest_step
    torch.testing.assert_close(seen.step[:, 0], largest * gamma.transpose(1, 2))


def test_norms_are_those_of_the_state_after_each_piece(tokens):
    model = build()
    seen = trace(model, tokens, piece=20)
    assert seen.ends == (20, 40, 50)
    for place, end in enumerate(seen.ends):
        _, state = model.prefill(tokens[:, :end], model.init_state(3))
        for layer in range(3):
            memory = state.layers[layer].memory
            for found, one in ((seen.key_norm, memory.key_memory), (seen.value_norm, memory.value_memory)):
                wanted = one.square().sum((-2, -1)).sqrt()
                torch.testing.assert_close(found[:, layer, :, place], wanted, rtol=1e-4, atol=1e-5)


def test_a_trace_changes_nothing_and_leaves_nothing_behind(tokens):
    model = build()
    before, _ = model.prefill(tokens, model.init_state(3))
    trace(model, tokens, piece=7)
    after, _ = model.prefill(tokens, model.init_state(3))
    assert torch.equal(before, after)
    assert all("_inputs" not in mixer.__dict__ for mixer in trellis_mixers(model).values())


def test_the_value_passs_own_gate_is_seen(tokens):
    own = trace(build(value_gates="own"), tokens, piece=50)
    assert own.value_gate.shape == own.gate.shape
    assert not torch.equal(own.value_gate, own.gate)
    assert trace(build(value_gates="shared"), tokens, piece=50).value_gate is None


def test_a_gate_held_open_is_a_model_without_that_gate(tokens):
    model, off = build(), build(gates=("off",))
    off.load_state_dict({n: p for n, p in model.state_dict().items() if n in off.state_dict()})
    closed, _ = model.prefill(tokens, model.init_state(3))
    with held_open(model, [0, 1, 2]):
        opened, _ = model.prefill(tokens, model.init_state(3))
    without, _ = off.prefill(tokens, off.init_state(3))
    torch.testing.assert_close(opened, without)
    assert not torch.allclose(opened, closed)
    with held_open(model, [1]):
        seen = trace(model, tokens, piece=50)  # it stands before what is held open
    assert torch.equal(seen.gate[:, 1], torch.ones_like(seen.gate[:, 1]))


def test_other_layers_are_passed_over(tokens):
    mixed = trace(build(pattern=("attention", "trellis", "attention")), tokens, piece=25)
    assert mixed.layers == (1,)
    with pytest.raises(ValueError, match="no Trellis layer"):
        trace(build(pattern=("attention",)), tokens, piece=25)
