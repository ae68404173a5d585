"""How far the cache of a model of transformers is trusted, what finding out costs, and what follows."""

from __future__ import annotations

import warnings

import pytest
import torch

from evals.peer_codec import PeerCodec
from evals.peer_model import PeerModel, PeerWarning
from evals.scorer import Scorer
from tests.evals.test_peers import CONFIGS, TRUST, fast_tokenizer, tiny


def test_half_the_bits_and_what_is_lacking_is_said_once():
    model = tiny(CONFIGS["mamba"], torch.bfloat16)
    with pytest.warns(PeerWarning, match="NAME: its cache continues single tokens only"):
        peer = PeerModel(model, name="NAME")
    assert peer.trust == "steps"  # found in fp32: rounding would hide it
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeerModel(tiny(CONFIGS["llama"], torch.bfloat16))


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2", "state in the module"])
def test_a_large_model_is_asked_in_16_bits(name, monkeypatch):
    monkeypatch.setattr("evals.peer_model._WIDENED", 0)
    model, widened = tiny(CONFIGS[name], torch.bfloat16), []
    model.register_forward_pre_hook(lambda module, _: widened.append(module.dtype != torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert PeerModel(model).trust == TRUST.get(name, "pieces")
    assert widened
    assert not any(widened)


def test_a_state_that_counts_for_less_than_rounding_is_not_trusted(monkeypatch):
    monkeypatch.setattr("evals.peer_model._WIDENED", 0)
    model = tiny(CONFIGS["mamba2"], torch.bfloat16)
    for parameter in model.parameters():
        parameter.data /= 4
    with pytest.warns(PeerWarning, match="returns no cache that continues its text"):
        assert PeerModel(model).trust == "nothing"
    monkeypatch.undo()
    assert PeerModel(model).trust == "pieces"


def test_a_long_text_after_steps_is_not_read_again(monkeypatch):
    model = PeerModel(tiny(CONFIGS["mamba"]), trust="steps")
    tokens = torch.randint(250, (1, 30), generator=torch.Generator().manual_seed(1))
    whole, _ = model.prefill(tokens, model.init_state(1))
    widths = []
    model.inner.register_forward_pre_hook(
        lambda *call: widths.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    for limit, expected in ((4096, [20, 30]), (25, [20, *[1] * 10])):
        monkeypatch.setattr("evals.peer_model._READ_AGAIN", limit)
        widths.clear()
        _, state = model.prefill(tokens[:, :20], model.init_state(1))
        logits, _ = model.prefill(tokens[:, 20:], state)
        assert torch.allclose(logits, whole[:, 20:], rtol=1e-4, atol=1e-4)
        assert widths == expected


@pytest.mark.parametrize("trust", ["pieces", "steps", "nothing"])
def test_a_call_that_reads_texts_again_stays_within_the_budget(monkeypatch, trust):
    monkeypatch.setattr("evals.scorer.READ_BUDGET", 128)
    model, sizes = PeerModel(tiny(CONFIGS["llama"]), trust=trust), []
    model.inner.register_forward_pre_hook(
        lambda *call: sizes.append(call[2]["input_ids"].numel()), with_kwargs=True
    )
    scorer = Scorer(model, PeerCodec(fast_tokenizer()))
    assert scorer.row_limit(30) == (64 if trust == "pieces" else 4)
    sizes.clear()
    scorer.log_likelihoods([("x" * 29, f"{choice}") for choice in "abcdefghijk"])
    assert max(sizes) <= 128
