"""Scores and texts from carried state equal those computed from scratch (fp64)."""

from __future__ import annotations

import pytest
import torch

from evals.oracle import OracleModel
from evals.sampling import Sampling, draw, stream_names
from evals.scorer import Scorer, map_tensors
from tests.evals.fakes import ByteTokenizer, RandomModel, RecurrentModel

TOKENIZER = ByteTokenizer()
CONTEXTS = ["The grass is green and", "The", "", "A longer context of a question, read once per group: "]
CHOICES = [" blue", " the sky", "x", ""]
REQUESTS = [(context, choice) for context in CONTEXTS for choice in CHOICES]


def _from_scratch(model, context, choice):
    before, after = Scorer(model, TOKENIZER).encode_pair(context, choice)
    if not after:
        return 0.0
    return model.log_probs(before + after)[-len(after) :].sum().item()


@pytest.mark.parametrize("max_rows", [1, 3, 64])
@pytest.mark.parametrize("prefill_chunk", [1, 7, 512])
def test_choices_scored_from_one_state_equal_separate_full_scoring(max_rows, prefill_chunk):
    model = RecurrentModel()
    scorer = Scorer(model, TOKENIZER, max_rows=max_rows, prefill_chunk=prefill_chunk)
    for (context, choice), score in zip(REQUESTS, scorer.log_likelihoods(REQUESTS)):
        assert score.log_prob == pytest.approx(_from_scratch(model, context, choice), abs=1e-10)
        assert score.tokens == len(scorer.encode_pair(context, choice)[1])


def test_the_context_is_read_once_for_all_choices():
    model = RecurrentModel()
    seen = []
    prefill = model.prefill
    model.prefill = lambda tokens, *rest, **options: (
        seen.append(tokens.numel()),
        prefill(tokens, *rest, **options),
    )[1]
    scorer = Scorer(model, TOKENIZER)
    assert scorer.row_limit(1000) == scorer.max_rows  # reads a little to measure a state
    seen.clear()
    scorer.log_likelihoods([("c" * 1000, f" choice {i}") for i in range(8)])
    assert sum(seen) < 1000 + 8 * 12


def test_prompts_of_unequal_length_share_a_batch():
    lengths = [5, 6, 30, 200, 231]
    batches = list(Scorer(RecurrentModel(), TOKENIZER)._batches(lengths))
    assert batches == [[0, 1, 2], [3, 4]]


def test_greedy_flag_is_the_argmax():
    model = RecurrentModel()
    logits, _ = model.prefill(torch.tensor([[TOKENIZER.bos_id]]), model.init_state(1))
    best = int(logits.argmax())
    scores = Scorer(model, TOKENIZER).score([[TOKENIZER.bos_id]], [[[best], [best - 1]]])[0]
    assert [score.greedy for score in scores] == [True, False]


def test_rolling_scores_whole_texts():
    model = RecurrentModel()
    texts = ["", "one", "a longer text than the first"]
    for text, score in zip(texts, Scorer(model, TOKENIZER).rolling(texts)):
        expected = model.log_probs([TOKENIZER.bos_id, *TOKENIZER.encode(text)]).sum().item() if text else 0.0
        assert score.log_prob == pytest.approx(expected, abs=1e-10)


def _recomputed(model, prompt, sampling, name):
    """Generation that reads everything again for each token."""
    ids, generator = list(prompt), sampling.generator(name)
    for _ in range(sampling.max_tokens):
        logits, _ = model.prefill(torch.tensor([ids]), model.init_state(1))
        token = draw(logits[0, -1], sampling, generator)
        if token == TOKENIZER.eos_id:
            break
        ids.append(token)
    return TOKENIZER.decode(ids[len(prompt) :]).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=20), Sampling(max_tokens=20, temperature=0.9, top_p=0.9, seed=3)]
)
def test_generation_from_state_equals_generation_by_recomputation(sampling):
    model = RecurrentModel()
    prompts = [
        [TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in ("", "abc", "some longer prompt", "z" * 90)
    ]
    texts = Scorer(model, TOKENIZER, max_rows=3).generate(prompts, sampling)
    names = stream_names(prompts)
    assert texts == [_recomputed(model, p, sampling, name) for p, name in zip(prompts, names)]


def test_generation_stops_before_the_stop_string():
    model = RecurrentModel(seed=1)
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("start")]
    free = Scorer(model, TOKENIZER).generate([prompt], Sampling(max_tokens=12, temperature=1.0))[0]
    stop = free[4:6]
    cut = Scorer(model, TOKENIZER).generate([prompt], Sampling(max_tokens=12, temperature=1.0, stop=(stop,)))[
        0
    ]
    assert cut == free[: free.index(stop)]


def test_top_p_keeps_the_most_probable_tokens():
    logits = torch.tensor([0.0, 3.0, 2.0, -5.0])
    drawn = {
        draw(logits, Sampling(max_tokens=1, temperature=1.0, top_p=0.5), _generator(i)) for i in range(50)
    }
    assert drawn == {1}
    drawn = {
        draw(logits, Sampling(max_tokens=1, temperature=1.0, top_p=0.9), _generator(i)) for i in range(200)
    }
    assert drawn == {1, 2}


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": -1}, {"stop": ("",)}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**({"max_tokens": 1} | wrong))


def test_prefill_pieces_bound_memory():
    model = RecurrentModel()
    list(Scorer(model, TOKENIZER, prefill_chunk=64).prefixes([[1] * 1000]))
    assert model.most_tokens == 64


def test_pieces_of_many_rows_share_one_budget(monkeypatch):
    model = RecurrentModel()
    monkeypatch.setattr("evals.scorer.READ_BUDGET", 1000)
    list(Scorer(model, TOKENIZER).prefixes([[1] * 300] * 5))
    assert model.most_tokens == 5 * 192  # 200 a row, cut to a multiple of 64


def test_logits_of_a_long_text_are_made_in_pieces():
    model, text = RecurrentModel(), "a text of some length, " * 20
    whole = Scorer(model, TOKENIZER).rolling([text, text[:7]])
    scorer = Scorer(model, TOKENIZER)
    scorer.row_limit(1)  # measures a state
    scorer._budget, model.most_tokens = 50, 0
    pieces = scorer.rolling([text, text[:7]])
    assert model.most_tokens <= 50
    for one, other in zip(whole, pieces):
        assert (one.greedy, one.tokens) == (other.greedy, other.tokens)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-9)


def test_rows_are_bounded_by_the_bytes_of_their_states():
    history = OracleModel([], vocab_size=TOKENIZER.vocab_size, eos_id=TOKENIZER.eos_id)  # 8 bytes a token
    scorer = Scorer(history, TOKENIZER, state_budget=8 * 1000 * 3)
    assert [len(batch) for batch in scorer._batches([1000] * 7)] == [3, 3, 1]
    assert [len(batch) for batch in scorer._batches([10] * 70)] == [64, 6]
    assert [len(batch) for batch in scorer._batches([10_000] * 2)] == [1, 1]
    fixed = Scorer(RecurrentModel(), TOKENIZER, state_budget=24 * 8 * 5)
    assert [len(batch) for batch in fixed._batches([10_000] * 7)] == [5, 2]
    assert fixed.row_limit(1) == 5  # a state of one size may be large after few tokens
    rows = []
    prefill = history.prefill
    history.prefill = lambda tokens, *rest, **options: (
        rows.append(len(tokens)),
        prefill(tokens, *rest, **options),
    )[1]
    scorer.score([[1] * 1000] * 2, [[[1]] * 4] * 2)
    assert max(rows) == 3  # 8 rows of two prompts and four choices


def test_what_each_prompt_answers_comes_in_the_order_of_the_prompts():
    model = RecurrentModel()
    prompts = [[TOKENIZER.bos_id, *range(length)] for length in (90, 3, 40, 3, 200)]
    seen = []

    def answer(prefix):
        seen.append(prefix.index)
        return [prefix.longest + len(rest) for rest in prefix.rests]

    assert Scorer(model, TOKENIZER).each(prompts, answer) == [len(prompt) for prompt in prompts]
    assert sorted(i for index in seen for i in index) == list(range(5))
    assert seen[0] == [4]  # the dearest first


@pytest.mark.parametrize("stop", [(), ("\x80",), ("e", "a", "\n")])
def test_a_text_is_the_same_alone_and_in_a_batch_whose_rows_end_early(stop):
    model = RecurrentModel(seed=2)
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=5, stop=stop)
    prompts = [[TOKENIZER.bos_id, *TOKENIZER.encode("p" * length)] for length in range(9)]
    together = Scorer(model, TOKENIZER).generate(prompts, sampling)
    assert together == [Scorer(model, TOKENIZER).generate([prompt], sampling)[0] for prompt in prompts]
    assert len({len(text) for text in together}) > 1


def test_equal_prompts_draw_from_streams_of_their_own():
    prompt = [TOKENIZER.bos_id, 1, 2]
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    scorer = Scorer(RecurrentModel(), TOKENIZER)
    first, second = scorer.generate([prompt, prompt], sampling)
    assert first != second
    assert scorer.generate([prompt, [3], prompt], sampling)[::2] == [first, second]


def test_map_tensors_reaches_every_container():
    state = {"a": [torch.ones(2), (torch.ones(2), None)], "b": RandomModel().init_state(2)}
    doubled = map_tensors(state, lambda tensor: tensor * 2)
    assert doubled["a"][0].tolist() == doubled["a"][1][0].tolist() == [2, 2]
    assert doubled["b"] == state["b"]
    assert doubled["a"][1][1] is None
