"""Needle prompts, and the code that scores them, shown to be passable and not passable by luck."""

from __future__ import annotations

import re

import pytest

from evals import needles
from evals.config import EvalConfig
from evals.needles import ANSWER_TOKENS, NeedleSpec, make_needle
from evals.tasks import needle as task
from tests.evals.fakes import ByteTokenizer, RandomModel

TOKENIZER = ByteTokenizer()
ESSAY = "Once there was a house. It stood on a hill! Nobody came? " * 9


def _words(text):
    """A count of tokens that is not one per character."""
    return 1 + len(re.findall(r"\w+|[^\w\s]|\n", text))


def _bytes(text):
    return 1 + len(TOKENIZER.encode(text))


@pytest.mark.parametrize("count", [_words, _bytes])
@pytest.mark.parametrize("haystack", ["noise", "essay"])
@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_prompts_fill_their_length_within_two_percent(length, haystack, count):
    spec = NeedleSpec(haystack=haystack, essay=ESSAY)
    for index in range(4):
        needle = make_needle(spec, length=length, index=index, count=count)
        assert needle.tokens == count(needle.prompt)
        assert 0.98 * length <= needle.tokens + ANSWER_TOKENS <= length


def test_prompts_are_deterministic_and_differ_by_seed_and_index():
    def prompt(seed, index):
        return make_needle(NeedleSpec(seed=seed), length=1024, index=index, count=_words).prompt

    assert prompt(42, 0) == prompt(42, 0)
    assert len({prompt(42, 0), prompt(42, 1), prompt(43, 0)}) == 3


def test_prompt_has_the_form_of_the_reference():
    needle = make_needle(NeedleSpec(), length=1024, index=3, count=_words)
    key = re.search(r"magic numbers for (\w+-\w+) is: (\d{7})\.\n", needle.prompt)
    assert key is not None
    assert key[2] == needle.answer
    assert needle.prompt.count(needle.answer) == 1
    assert needle.prompt.endswith(
        f"\nWhat is the special magic number for {key[1]} mentioned in the provided text? "
        f"The special magic number for {key[1]} mentioned in the provided text is"
    )
    assert needle.prompt.startswith("A special magic number is hidden within the following text.")


def test_depths_cover_the_haystack():
    depths = [make_needle(NeedleSpec(), length=2048, index=i, count=_words).depth for i in range(200)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


@pytest.mark.parametrize(
    "kind,form", [("number", r"\d{7}"), ("uuid", r"[0-9a-f-]{36}"), ("word", r"\w+-\w+")]
)
def test_ten_distinct_values_of_one_form(kind, form):
    needle = make_needle(NeedleSpec(value=kind), length=1024, index=0, count=_words)
    values = {needle.answer, *needle.distractors}
    assert len(values) == 10
    assert all(re.fullmatch(form, value) for value in values)


def test_a_hidden_word_is_never_the_key(monkeypatch):
    for name in ("ADJECTIVES", "NOUNS"):
        monkeypatch.setattr(needles, name, ("a", "b", "c", "d"))
    for index in range(40):
        needle = make_needle(NeedleSpec(value="word"), length=1024, index=index, count=_words)
        key = re.search(r"magic words for (\w+-\w+) is: ", needle.prompt)[1]
        assert key not in {needle.answer, *needle.distractors}


def test_a_length_without_room_is_refused():
    with pytest.raises(ValueError, match="needle length 150 is too short"):
        make_needle(NeedleSpec(), length=150, index=0, count=_words)


def _needles(count, length=700):
    return [make_needle(NeedleSpec(), length=length, index=i, count=_bytes) for i in range(count)]


def test_an_oracle_scores_full_marks_through_the_same_code():
    outcomes = task._oracle(TOKENIZER, _needles(6))
    assert all(o.generated and o.chosen for o in outcomes)


def test_a_random_model_scores_about_chance(monkeypatch):
    monkeypatch.setattr(task, "ANSWER_TOKENS", 8)  # long enough for an answer
    outcomes = task.score_needles(RandomModel(), TOKENIZER, _needles(300))
    assert sum(o.generated for o in outcomes) == 0
    # 300 draws at 10%: 4.3 standard deviations on either side
    assert 8 <= sum(o.chosen for o in outcomes) <= 52


def test_ties_go_by_chance():
    class Constant(RandomModel):
        def prefill(self, tokens, state, **options):
            logits, state = super().prefill(tokens, state, **options)
            return logits * 0, state

    needles = _needles(100)
    chosen = [outcome.chosen for outcome in task.score_needles(Constant(), TOKENIZER, needles)]
    assert 1 <= sum(chosen) <= 25


def test_share_comes_with_its_interval():
    assert task._percent([True] * 8)["high"] == 100
    row = task._percent([True] + [False] * 9)
    assert row["score"] == pytest.approx(10)
    assert 1 < row["low"] < 10 < row["high"] < 41


@pytest.mark.parametrize(
    "wrong",
    [{"needle_samples": 0}, {"needle_lengths": (255,)}, {"needle_haystack": "essay"}, {"sample_top_p": 2.0}],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"evals.{next(iter(wrong))}"):
        EvalConfig(**wrong)


def test_an_essay_without_words_is_refused(tmp_path):
    (tmp_path / "essay.txt").write_text(" \n")
    config = EvalConfig(needle_haystack="essay", needle_essay=str(tmp_path / "essay.txt"))
    with pytest.raises(ValueError, match="holds no words"):
        task.TASK.settings(config)
