"""Reading a prefix and then single tokens gives what one forward pass gives."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models.conftest import CASES
from trellis_dist.models.config import AttentionConfig
from trellis_dist.models.counts import state_bytes
from trellis_dist.models.kv_cache import KVCache
from trellis_dist.models.registry import MIXERS

MODELS = {
    "trellis": {},
    "attention": {"pattern": ("attention",)},
    "hybrid": {"pattern": ("trellis", "attention"), "num_layers": 3},
    "window": {"pattern": ("attention",), "attention_window": 5},
    "fixed gate, learned start, no convolution": {
        "trellis": {"gates": ("fixed", "off"), "learned_initial_memory": True, "conv_kernel": 0}
    },
    "corrected, own gates, silu_rms": {
        "trellis": {
            "update": "corrected",
            "phi": "tanh",
            "readout": "silu_rms",
            "value_gates": "own",
            "step_bound": "token",
            "step_size_max": 1.0,
        }
    },
    "corrected, affine, one gate off": {
        "trellis": {"update": "corrected", "readout_affine": True, "value_gates": "own", "gates": ("off",)}
    },
    "one token per chunk": {"trellis": {"chunk_size": 1, "conv_kernel": 1}},
    **CASES,
}


def test_every_mixer_is_held_to_this():
    covered = {kind for options in MODELS.values() for kind in options.get("pattern", ("trellis",))}
    assert covered == set(MIXERS), "add the new mixer to MODELS here and in test_packing.py"


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request, tiny):
    options = dict(request.param)
    if "attention_window" in options:
        options["attention"] = AttentionConfig(window=options.pop("attention_window"))
    return tiny(**options)


@pytest.mark.parametrize("pieces", [[1], [3, 1, 4], [4, 4], [13], [2, 9]])
def test_prefill_then_decode_equals_forward(model, tokens, pieces):
    x = tokens(2, 19)
    expected, state, outputs = model(x), model.init_state(2), []
    for piece in x[:, : sum(pieces)].split(pieces, dim=1):
        logits, state = model.prefill(piece, state)
        outputs.append(logits)
    while state.position < x.shape[1]:
        logits, state = model.decode_step(x[:, state.position], state)
        outputs.append(logits.unsqueeze(1))
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)], ids=str)
def test_a_narrow_type_decodes_what_the_wide_one_computes(model, tokens, dtype, bound):
    """Prefill and steps in fp32 or bf16, against the forward pass of the same weights in fp64 (relative)."""
    x, narrow = tokens(2, 19), copy.deepcopy(model).to(dtype)
    expected = copy.deepcopy(narrow).double()(x)
    logits, state = narrow.prefill(x[:, :6], narrow.init_state(2))
    outputs = [logits]
    for token in x[:, 6:].unbind(1):
        logits, state = narrow.decode_step(token, state)
        outputs.append(logits.unsqueeze(1))
    error = torch.cat(outputs, dim=1).double() - expected
    assert error.norm() < bound * expected.norm()


def test_the_last_logits_alone_are_the_last_of_all(model, tokens):
    x, state = tokens(2, 11), model.init_state(2)
    logits, after = model.prefill(x, state)
    last, after_last = model.prefill(x, state, last_only=True)
    torch.testing.assert_close(last, logits[:, -1], atol=1e-12, rtol=1e-12)
    assert after_last.position == after.position == 11
    follow = [model.decode_step(x[:, 0], each)[0] for each in (after, after_last)]
    assert torch.equal(*follow)


def test_logits_without_a_state_are_those_of_a_prefill(model, tokens):
    x = tokens(2, 13)
    _, state = model.prefill(x[:, :6], model.init_state(2))
    expected, _ = model.prefill(x[:, 6:], state)
    torch.testing.assert_close(model.logits_after(x[:, 6:], state), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "first, second", [((0, 2, 7), (0, 0, 0)), ((4, 0, 1), (9, 0, 10)), ((7, 7, 0), (3, 8, 0))]
)
def test_rows_behind_pads_continue_as_each_does_alone(model, tokens, first, second):
    """Two calls of 9 and 10 tokens with pads, one without, a step: of rows that are not of one length."""
    whole, parts = tokens(3, 26), (9, 10, 6, 1)
    calls = list(zip(whole.split(parts, dim=1), (first, second, None)))
    state = model.init_state(3)
    if not model.pads_within:
        with pytest.raises(ValueError, match="give rows of one length"):
            model.prefill(calls[0][0], state, pads=first)
        return
    for x, pads in calls:
        logits, state = model.prefill(x, state, pads=pads)
    last, _ = model.decode_step(whole[:, -1], state)
    for row in range(3):
        own = torch.cat([x[row, pads[row] if pads else 0 :] for x, pads in calls] + [whole[row, -1:]])
        expected = model(own[None])[0, -7:]
        got = torch.cat([logits[row], last[row : row + 1]])
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_one_prefix_continues_in_two_ways(model, tokens):
    x, other = tokens(1, 9), tokens(1, 9, seed=1)
    _, prefix = model.prefill(x, model.init_state(1))
    first, state = model.decode_step(other[:, 0], prefix)
    model.decode_step(other[:, 1], prefix)
    second, _ = model.decode_step(other[:, 2], state)
    expected = model(torch.cat([x, other[:, [0, 2]]], dim=1))[:, -2:]
    torch.testing.assert_close(torch.stack([first, second], dim=1), expected, atol=1e-10, rtol=1e-10)


def sizes(model, length, tokens):
    state, sizes = model.init_state(1), []
    for token in tokens(1, length).unbind(1):
        _, state = model.decode_step(token, state)
        sizes.append(state.bytes())
    return sizes


def test_trellis_state_does_not_grow(tiny, tokens):
    model = tiny()
    expected = state_bytes(model.config, position=23, element_bytes=8)
    assert set(sizes(model, 23, tokens)) == {expected}
    assert model.init_state(1).bytes() == expected
    assert model.prefill(tokens(1, 8), model.init_state(1))[1].bytes() == expected


def test_attention_state_grows_with_every_token(tiny, tokens):
    model = tiny(pattern=("attention",))
    kept = [state_bytes(model.config, position=i + 1, element_bytes=8) for i in range(140)]
    assert kept[-1] == 140 * kept[0]
    # 64 tokens at first; a full buffer becomes one for twice the tokens, all of which are counted.
    rooms = [64] * 64 + [130] * 66 + [262] * 10
    assert sizes(model, 140, tokens) == [room * kept[0] for room in rooms]


def test_windowed_cache_keeps_the_window_in_bounded_storage():
    cache = KVCache.empty(torch.empty(1, 2, 0, 4), window=5)
    for i in range(1000):
        step = torch.full((1, 2, 1, 4), float(i))
        cache = cache.append(step, -step)
    keys, values = cache.keys_values()
    assert keys[0, 0, :, 0].tolist() == [995, 996, 997, 998, 999]
    assert torch.equal(values, -keys)
    assert cache.buffer.keys.shape[2] <= 64
    assert cache.bytes() == 2 * cache.buffer.keys.shape[2] * 8 * 4


def test_a_state_keeps_its_start_while_the_parameter_is_trained_on(tiny, tokens):
    model, x = tiny(trellis={"learned_initial_memory": True}), tokens(2, 5)
    _, state = model.prefill(x[:, :3], model.init_state(2))
    expected, _ = model.prefill(x[:, 3:], state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "initial" in name:
                parameter.add_(1.0)
    assert torch.equal(model.prefill(x[:, 3:], state)[0], expected)


def test_no_row_at_all_can_be_chosen_of_a_state(tiny):
    layer = tiny().init_state(3).layers[0]
    assert layer.select_rows([]).memory.key_memory.shape[0] == 0
    assert layer.select_rows([2, 2]).tail.shape[0] == 2


def test_rows_must_be_those_of_the_state(tiny, tokens):
    model = tiny()
    with pytest.raises(ValueError, match="2 rows of tokens for a state of 3"):
        model.prefill(tokens(2, 4), model.init_state(3))
    with pytest.raises(ValueError, match="at least one row"):
        model.init_state(0)
