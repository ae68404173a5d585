"""Common words: of a long numbered list the ten words that stand in it most often are asked for.

    Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones
    that appear most often.
    1. anchor 2. river 3. anchor ...
    Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most
    often in the list are:

Ten words stand in it 30 times and every other word 3 times (6 and 1 in prompts below 4096 tokens). A solved
example comes before. Where the list needs more words than there are here, joined pairs of words follow.
"""

from __future__ import annotations

import random

from evals.ruler.fit import fill
from evals.ruler.question import Encode, Question, distinct, generator
from evals.ruler.words import ADJECTIVES, NOUNS, VERBS

__all__ = ["ANSWER_TOKENS", "COMMON", "make_common_words"]

ANSWER_TOKENS, COMMON = 120, 10
# From this length on the list has the frequencies of the reference; shorter ones hold fewer words.
FULL_LENGTH = 4096
_FULL, _SHORT = (30, 3), (6, 1)
# Words of the example's list, and how often its common and its other words stand in it.
_FULL_EXAMPLE, _SHORT_EXAMPLE = (40, 10, 3), (20, 3, 1)
# Of four letters or more: a shorter answer would too often stand in what a model writes by chance.
_SINGLES = tuple(sorted(word for word in (*ADJECTIVES, *NOUNS, *VERBS) if len(word) > 3))
_PAIRS = len(ADJECTIVES) * len(NOUNS)


class _List:
    """Common words and what they stand among, drawn once; how many others are used is said later."""

    def __init__(self, rng: random.Random, *, others: int) -> None:
        self.common = distinct(lambda: rng.choice(_SINGLES), COMMON)
        self._others = self._pool(rng, others)
        self._shuffle = rng.getrandbits(64)
        self.size = len(self._others)

    def _pool(self, rng: random.Random, count: int) -> list[str]:
        """Other words, none of which holds a common one: singles, then joined pairs."""
        singles = rng.sample(_SINGLES, len(_SINGLES))
        numbers = rng.sample(range(_PAIRS), max(count - len(singles), 0))
        pairs = [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in numbers]
        return [word for word in [*singles, *pairs] if not any(c in word for c in self.common)][:count]

    def prompt(self, others: int, *, often: int, seldom: int) -> str:
        """The question with so many other words in the list."""
        entries = self.common * often + self._others[:others] * seldom
        random.Random(self._shuffle).shuffle(entries)
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{_numbered(entries)}\n"
            f"Question: What are the {COMMON} most common words in the above list? "
            f"Answer: The top {COMMON} words that appear most often in the list are:"
        )

    def reply(self) -> str:
        """What answers the prompt."""
        return " " + _numbered(self.common)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def make_common_words(*, seed: int, length: int, index: int, encode: Encode) -> Question:
    """Question number ``index`` for a total of ``length`` tokens, ``ANSWER_TOKENS`` of them for the answer.

    Raises:
        ValueError: the shortest list is longer than ``length`` allows.
    """
    rng = generator(seed, "cwe", length, index)
    full = length >= FULL_LENGTH
    often, seldom = _FULL if full else _SHORT
    # Enough for a tokenizer of one token per entry.
    words = _List(rng, others=length // seldom)
    example = _example(rng, *(_FULL_EXAMPLE if full else _SHORT_EXAMPLE))

    def build(others: int) -> str:
        return f"{example}\n{words.prompt(others, often=often, seldom=seldom)}"

    _, prompt, ids = fill("cwe", build, encode, length=length, answer_tokens=ANSWER_TOKENS, most=words.size)
    return Question(prompt=prompt, ids=ids, answers=tuple(words.common), reply=words.reply())


def _example(rng: random.Random, words: int, often: int, seldom: int) -> str:
    solved = _List(rng, others=words - COMMON)
    return solved.prompt(words - COMMON, often=often, seldom=seldom) + solved.reply()
