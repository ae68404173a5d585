"""The scorer and the decode task on the project's own language model."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from evals.sampling import Sampling, draw, stream_names
from evals.scorer import Scorer
from evals.tasks import decode
from tests.evals.fakes import ByteTokenizer
from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import AttentionConfig, ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    num_layers=2,
    dim=16,
    num_heads=2,
    trellis=TrellisConfig(slots=8, chunk_size=8),
    attention=AttentionConfig(sliding_window=6),
    baselines=BaselineConfig(slots=8, chunk_size=8, mini_batch=4),
)
PATTERNS = [
    ("trellis",),
    ("trellis", "attention"),
    ("gated_deltanet", "sliding_window"),
    ("gsa", "ttt_linear"),  # mini-batches, entered inside one
]
CONTEXTS = ["The grass is green and", "The sky", "a context longer than several chunks of the model"]
REQUESTS = [(context, choice) for context in CONTEXTS for choice in (" blue", " far away", " x")]


def _model(pattern=("trellis",), dtype=torch.float64, seed=0):
    # Larger weights than training starts from: at 0.02 every continuation would be as likely as any other.
    config = replace(CONFIG, pattern=pattern, init_std=0.3)
    return build_language_model(config, seed=seed, dtype=dtype).eval()


@torch.no_grad()
def _log_probs(model, ids):
    logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prefill_chunk", [5, 512])
def test_choices_scored_from_one_state_equal_separate_full_scoring(pattern, prefill_chunk):
    model = _model(pattern)
    scorer = Scorer(model, TOKENIZER, prefill_chunk=prefill_chunk)
    for request, score in zip(REQUESTS, scorer.log_likelihoods(REQUESTS)):
        before, after = scorer.encode_pair(*request)
        expected = _log_probs(model, before + after)[-len(after) :].sum()
        assert score.log_prob == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_from_state_equals_generation_by_recomputation(pattern):
    model = _model(pattern)
    sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=1)
    prompts = [[TOKENIZER.bos_id, *TOKENIZER.encode(context)] for context in CONTEXTS]
    texts = Scorer(model, TOKENIZER).generate(prompts, sampling)
    for prompt, name, text in zip(prompts, stream_names(prompts), texts):
        ids, generator = list(prompt), sampling.generator(name)
        for _ in range(sampling.max_tokens):
            with torch.no_grad():
                token = draw(model(torch.tensor([ids]))[0, -1], sampling, generator)
            if token == TOKENIZER.eos_id:
                break
            ids.append(token)
        assert text == TOKENIZER.decode(ids[len(prompt) :]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_memorised_sequence_has_the_higher_likelihood():
    model = _model(dtype=torch.float32).train()
    scorer = Scorer(model, TOKENIZER)
    before, after = scorer.encode_pair("The number is", " 7351982")
    ids = torch.tensor([before + after])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (model.loss_sum(ids[:, :-1], ids[:, 1:].contiguous()) / ids.numel()).backward()
        optimizer.step()
    model.eval()
    learned, other = scorer.log_likelihoods([("The number is", " 7351982"), ("The number is", " 7351928")])
    assert learned.log_prob > other.log_prob + 1
    assert learned.greedy
    assert not other.greedy
    assert scorer.generate([before], Sampling(max_tokens=8)) == [" 7351982"]


POSITIONS = (64, 128, 1024)


def test_decode_state_is_flat_for_recurrent_layers_and_grows_for_attention():
    flat = []
    for pattern in (("trellis",), ("gated_deltanet", "ttt_linear"), ("mamba2", "sliding_window")):
        flat += (rows := decode.measure(_model(pattern, dtype=torch.float32), POSITIONS))
        assert len({row["state_bytes"] for row in rows}) == 1, pattern
    attention = decode.measure(_model(("attention",), dtype=torch.float32), POSITIONS)
    steps = decode.WARMUP_STEPS + decode.TIMED_STEPS
    per_token = 2 * CONFIG.num_layers * CONFIG.dim * 4
    assert [row["state_bytes"] for row in attention] == [(p + steps) * per_token for p in POSITIONS]
    assert all(row["ms_per_token"] > 0 for row in flat + attention)


def test_a_cache_has_room_for_the_steps_and_no_more():
    (filled,) = decode.states_at(_model(("attention",), dtype=torch.float32), (64,))
    room = 64 + decode.WARMUP_STEPS + decode.TIMED_STEPS
    assert [layer.buffer.keys.shape[2] for layer in filled.layers] == [room] * CONFIG.num_layers


def test_one_cache_is_kept_at_a_time(monkeypatch):
    buffers, alive, fill = [], [], decode.filled_state

    def counted(model, position, **how):
        alive.append(sum(buffer() is not None for buffer in buffers))
        state = fill(model, position, **how)
        buffers.append(weakref.ref(state.layers[0].buffer))
        return state

    monkeypatch.setattr(decode, "filled_state", counted)
    decode.measure(_model(("attention",), dtype=torch.float32), POSITIONS)
    assert alive == [0] * len(POSITIONS)


def test_states_are_at_the_positions_asked_for():
    for pattern in (("trellis",), ("attention",), ("trellis", "attention")):
        states = decode.states_at(_model(pattern, dtype=torch.float32), POSITIONS)
        assert [state.position for state in states] == list(POSITIONS)
