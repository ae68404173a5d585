"""RULER's prompts: their form, their length, where the needles are, and that they are the same again."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from evals.ruler.catalogue import RULER
from evals.ruler.fit import SLACK, SLACK_TOKENS, fit
from evals.ruler.haystack import DEPTHS, NOISE, Essay, Noise
from evals.ruler.question import distinct
from evals.ruler.words import ADJECTIVES, NOUNS, VERBS
from tests.evals.conftest import library_texts
from tests.evals.ruler_text import Characters, Marks, Words, encoder, prose

ESSAY = prose()
SINGLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_single_word")
MANY = ("niah_multikey_1", "niah_multivalue", "niah_multiquery")
NEEDLE = re.compile(r"One of the special magic (number|uuid|word)s for ([a-z]+-[a-z]+) is: ([0-9a-z-]+)\.")
FORMS = {"number": r"\d{7}", "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "word": r"[a-z]+-[a-z]+"}


@pytest.fixture(scope="module")
def tokenizer():
    documents = [*library_texts(), ESSAY, " ".join((*NOUNS, *ADJECTIVES, *VERBS))]
    return Tokenizer(train_tokenizer(TokenizerConfig(vocab_size=2048, threads=1), documents))


questions = cache(lambda name: RULER[name].questions(ESSAY))


def ask(name, *, tokenizer=None, length=4096, index=0, seed=42):
    encode = encoder(tokenizer or Marks())
    return questions(name)(seed=seed, length=length, index=index, encode=encode)


@pytest.mark.parametrize("length", [1024, 4096, 32768])
@pytest.mark.parametrize("name", RULER)
def test_prompts_fill_their_length_within_two_percent(name, length, tokenizer):
    for index in range(2):
        question = ask(name, tokenizer=tokenizer, length=length, index=index)
        assert question.ids == [tokenizer.bos_id, *tokenizer.encode(question.prompt)]
        assert 0.98 * length <= len(question.ids) + RULER[name].answer_tokens <= length


def test_a_prompt_of_128k_tokens(tokenizer):
    question = ask("niah_single_2", tokenizer=tokenizer, length=2**17)
    assert 0.98 * 2**17 <= len(question.ids) + 128 <= 2**17
    assert question.prompt.count(question.answers[0]) == 1


@pytest.mark.parametrize("name", RULER)
def test_questions_are_the_same_again_and_differ_by_seed_index_and_length(name):
    first = ask(name)
    assert ask(name) == first
    others = [ask(name, index=1), ask(name, seed=43), ask(name, length=5000)]
    assert len({question.answers for question in [first, *others]}) == 4


@pytest.mark.parametrize("name", SINGLES)
def test_a_single_needle_stands_once_and_the_prompt_has_the_references_words(name):
    question = ask(name, index=3)
    ((kind, key, value),) = NEEDLE.findall(question.prompt)
    assert (value,) == question.answers
    assert question.prompt.count(value) == 1
    assert question.prompt.startswith(
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    assert question.prompt.endswith(
        f"\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
        f"The special magic {kind} for {key} mentioned in the provided text is"
    )
    values = {value, *question.distractors}
    assert len(values) == 10
    assert all(re.fullmatch(FORMS[kind], other) for other in values)
    assert not any(other in question.prompt for other in question.distractors)


@pytest.mark.parametrize("name", MANY)
def test_four_needles_stand_once_each_and_the_asked_ones_answer(name):
    question = ask(name, index=2)
    found = NEEDLE.findall(question.prompt)
    by_key = {}
    for kind, key, value in found:
        assert kind == "number"
        assert question.prompt.count(value) == 1
        by_key.setdefault(key, set()).add(value)
    assert len(found) == 4
    assert len(by_key) == (1 if name == "niah_multivalue" else 4)
    last = question.prompt.rsplit("\n", 1)[1]
    plural = name != "niah_multikey_1"
    keys = re.findall(r"[a-z]+-[a-z]+", last.split("?")[0])
    assert len(keys) == (4 if name == "niah_multiquery" else 1)
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    what, kind, verb = ("are all", "numbers", "are") if plural else ("is", "number", "is")
    assert last == (
        f"What {what} the special magic {kind} for {query} mentioned in the provided text? "
        f"The special magic {kind} for {query} mentioned in the provided text {verb}"
    )
    some = "Some special magic numbers are hidden" if plural else "A special magic number is hidden"
    assert question.prompt.startswith(some)
    assert f"quiz you about the {kind} afterwards.\n" in question.prompt
    assert set(question.answers) == set().union(*(by_key[key] for key in keys))
    assert len(question.answers) == (4 if plural else 1)
    assert question.distractors == ()


def test_a_variable_chain_is_in_order_and_its_example_is_solved():
    question = ask("vt", index=1)
    example, asked = question.prompt.split("\n\nMemorize and track the chain(s)")
    for text, letters, answers in ((asked, 5, question.answers), (example, 3, None)):
        names = re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+) |(\d{5}))", text)
        assert [after for _, after, _ in names] == ["", *(name for name, _, _ in names[:-1])]
        found = tuple(name for name, _, _ in names)
        assert len(set(found)) == 5
        assert {len(name) for name in found} == {letters}
        assert answers in (None, found)
        end = (
            f"Question: Find all variables that are assigned the value {names[0][2]} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
            f"assigned the value {names[0][2]}, they are:"
        )
        assert text.endswith(end if answers else f"{end} {' '.join(found)}")
    assert example.startswith("Memorize and track the chain(s) of variable assignment hidden in ")
    assert len(Marks().encode(example)) <= 500
    assert question.reply == " " + " ".join(question.answers)


def test_noise_stands_between_two_assignments():
    for index in range(60):
        question = ask("vt", length=1024, index=index)
        asked = question.prompt.split("\n\nMemorize and track")[1]
        assert asked.count(f"{NOISE}\n") > 5
        assert not re.search(r"= (\d{5}|VAR [A-Z]{5} ) VAR", asked)


@pytest.mark.parametrize("length,counts", [(2048, (3, 1, 6, 1)), (8192, (10, 3, 30, 3))])
def test_common_words_are_the_most_frequent_and_hide_in_no_other_word(length, counts):
    question = ask("cwe", length=length)
    example, asked = question.prompt.split("\nBelow is a numbered list")
    for text, often, seldom, answers in (
        (example, *counts[:2], None),
        (asked, *counts[2:], question.answers),
    ):
        entries = re.findall(r"(\d+)\. ([a-z-]+)", text.split("\n")[1])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        count = Counter(word for _, word in entries)
        common = {word for word, n in count.items() if n == often}
        assert len(common) == 10
        assert {n for word, n in count.items() if word not in common} == {seldom}
        assert not any(a != b and a in b for a in common for b in count)
        assert answers is None or set(answers) == common
        if answers is None:
            assert common == set(re.findall(r"\d+\. ([a-z-]+)", text.split("in the list are:")[1]))
    assert asked.endswith(
        "\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )


def test_depths_in_noise_are_uniform():
    depths = sorted(ask("niah_single_1", length=2048, index=i).depth for i in range(400))
    # Kolmogorov's bound at 1%, and half the distance between two lines
    lines = 90
    bound = 1.63 / math.sqrt(len(depths)) + 0.5 / lines
    assert max(abs((i + 0.5) / len(depths) - depth) for i, depth in enumerate(depths)) < bound


def test_depths_in_prose_are_the_forty_each_as_likely():
    assert (len(set(DEPTHS)), DEPTHS[0], DEPTHS[-1]) == (40, 0, 100)
    places = [ask("niah_single_2", length=2048, index=i, seed=1).depth for i in range(800)]
    # A needle stands before the sentence that its depth falls into: less than one sentence above the depth.
    counts = Counter(min(depth for depth in DEPTHS if depth / 100 >= place) for place in places)
    assert set(counts) == set(DEPTHS)
    # chi-square of 40 bins: 62.4 is its 1% point
    assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 62.4


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multiquery"])
def test_the_recorded_depth_is_where_the_asked_needles_are(name):
    for index in range(5):
        question = ask(name, index=index)
        _, text, last = re.split(r"(?s)\n(.*)\n", question.prompt)
        places = [match.start() / len(text) for match in NEEDLE.finditer(text) if match[2] in last]
        assert question.depth == pytest.approx(sum(places) / len(places), abs=0.04)


def test_needles_of_one_prompt_are_at_several_depths():
    question = ask("niah_multivalue")
    places = [match.start() for match in NEEDLE.finditer(question.prompt)]
    assert min(b - a for a, b in pairwise(places)) > 100


@pytest.mark.parametrize("name,length", [("niah_single_1", 150), ("vt", 300), ("cwe", 400)])
def test_a_length_without_room_is_refused(name, length):
    with pytest.raises(ValueError, match=rf"{name}: {length} tokens are too few: .* take \d+ .* longer ones"):
        ask(name, length=length)


@given(st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_a_haystack_has_the_words_asked_for_and_starts_again_when_it_ends(words):
    essay = Essay('Mr. Bold met Dr. Able.  He said:\n"Go!" Nobody went? So he (too.) left')
    cycle = " ".join(essay.words * (words // len(essay.words) + 1)).split()
    assert " ".join(essay.parts(words)).split() == cycle[:words]
    noise = "\n".join(Noise().parts(words))
    assert len(noise.split()) == words
    assert (f"{NOISE}\n" * (words // len(NOISE.split()) + 1)).startswith(noise)


def test_prose_is_cut_at_sentences():
    essay = Essay('Mr. Bold met Dr. Able.  He said:\n"Go!" Nobody went? So he (too.) left')
    assert essay.parts(len(essay.words)) == [
        "Mr. Bold met Dr. Able.",
        'He said: "Go!"',
        "Nobody went?",
        "So he (too.)",
        "left",
    ]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=400),
    start=st.integers(0, 50),
    room=st.integers(1, 3000),
)
@example(sizes=[*[0] * 7, 3001, *[0] * 5000], start=0, room=3000)  # a secant alone creeps towards the jump
@settings(max_examples=200, deadline=None)
def test_the_search_ends_and_never_exceeds_its_room(sizes, start, room):
    trials, most = [], 8 + 2 * math.log2(len(sizes) + 1)

    def encode(units):
        trials.append(units)
        assert len(trials) <= most, "the search creeps"
        return [0] * (start + sum(sizes[:units]))

    fitted = fit(encode, room, most=len(sizes))
    if fitted is None:
        assert start > room
        return
    units, ids = fitted
    assert len(ids) == start + sum(sizes[:units]) <= room
    slack = min(int(SLACK * room), SLACK_TOKENS)
    full = units == len(sizes) or start + sum(sizes[: units + 1]) > room
    assert full or room - len(ids) <= slack


@given(
    name=st.sampled_from([name for name in RULER if name != "cwe"]),
    tokenizer=st.sampled_from([Characters(), Words(), Marks()]),
    length=st.integers(2048, 20_000),
    index=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_any_tokenizer_fills_any_length(name, tokenizer, length, index):
    question = ask(name, tokenizer=tokenizer, length=length, index=index)
    assert 0.98 * length <= len(question.ids) + RULER[name].answer_tokens <= length


@pytest.mark.parametrize("tokenizer", [Characters(), Words()])
@pytest.mark.parametrize("length", [8192, 32768])
def test_any_tokenizer_fills_a_list_of_words(length, tokenizer):
    question = ask("cwe", tokenizer=tokenizer, length=length)
    assert 0.98 * length <= len(question.ids) + RULER["cwe"].answer_tokens <= length


def test_hidden_values_stand_in_nothing_else():
    draws = iter(["cold", "old", "told", "scolded", "red", "blue", "green"])
    assert distinct(lambda: next(draws), 3, taken=("redder",), text="a blue sky") == ["cold", "told", "green"]
    with pytest.raises(ValueError, match="nearly every key or value"):
        distinct(lambda: "blue", 1, text="a blue sky")


def test_words_are_plain_and_in_one_list_only():
    words = (*ADJECTIVES, *NOUNS, *VERBS)
    assert len(words) == len(set(words)) > 2500
    assert all(re.fullmatch(r"[a-z]{2,8}", word) for word in words)
