"""TTT-linear and Titans as layers: starts are learned, states do not grow, options count."""

from __future__ import annotations

import pytest
import torch

from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.counts import state_bytes

KINDS = {"ttt_linear": {}, "titans": {}, "titans, two layers": {"titans_depth": 2}}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request, tiny):
    kind = request.node.callspec.id.partition(",")[0]
    return tiny(pattern=(kind,), baselines=request.param)


def test_the_state_has_one_size_inside_and_between_mini_batches(model, tokens):
    state, expected = model.init_state(1), state_bytes(model.config, position=9, element_bytes=8)
    for token in tokens(1, 9).unbind(1):
        _, state = model.decode_step(token, state)
        assert state.bytes() == expected
    assert state.layers[0].offset == 9 % model.config.baselines.mini_batch


def test_every_parameter_is_trained(model, tokens):
    """The start of the memory too, through mini-batches that end and one that does not."""
    x = tokens(2, 11)
    model.loss_sum(x, tokens(2, 11, seed=1)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still


def test_slots_whose_scale_is_nought_hide_what_they_write_for_a_while(tiny, tokens):
    """A later slot shows it: what is carried inside a mini-batch is the sum, not the layer that it makes."""
    model, x = tiny(pattern=("ttt_linear",)), tokens(2, 12)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.slot_rest[:, 1] = -2.0
    assert model.blocks[0].mixer.head_weights()["slot_scale"][0].tolist() == [1, 0, 1 / 3, 1 / 4]
    state, outputs = model.init_state(2), []
    for token in x.unbind(1):
        logits, state = model.decode_step(token, state)
        outputs.append(logits)
    torch.testing.assert_close(torch.stack(outputs, dim=1), model(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "option", "scale"), [("ttt_linear", "ttt_step", 1 / 8), ("titans", "titans_step", 1 / 4)]
)
def test_steps_are_bounded(tiny, kind, option, scale):
    """By the head's width (8) or by the mini-batch (4), whatever the projection says."""
    mixer = tiny(pattern=(kind,), baselines={option: 3.0}).blocks[0].mixer
    parts = {p.name: torch.full((1, 5, 2, p.width), 50.0) for p in mixer.projections}
    step = mixer.make_tokens(parts)["step"]
    torch.testing.assert_close(step, torch.full_like(step, 3.0 * scale), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttt_step": 0.0}, "ttt_step = 0.0: must be positive"),
        ({"titans_step": -1.0}, "titans_step = -1.0: must be positive"),
        ({"titans_depth": 0}, "titans_depth = 0: use 1 to 4 layers"),
        ({"head_norm_eps": 0.0}, "head_norm_eps = 0.0: must be positive; leave it out"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BaselineConfig(**options)
