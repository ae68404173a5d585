"""Needles in a haystack: one value, or several, hidden in a long text and asked for at its end.

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you
    about the number afterwards.
    {haystack with "One of the special magic numbers for {key} is: {value}."}
    What is the special magic number for {key} mentioned in the provided text? The special magic number for
    {key} mentioned in the provided text is

Where several values answer, the words are plural: Some special magic numbers are hidden ... What are all the
special magic numbers for {keys} mentioned in the provided text? ... are
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from evals.config import TaskName
from evals.ruler.fit import WORDS_PER_TOKEN, fill
from evals.ruler.haystack import Haystack
from evals.ruler.question import Encode, Ids, Question, distinct, generator
from evals.ruler.words import ADJECTIVES, NOUNS

__all__ = ["ANSWER_TOKENS", "CHOICES", "NiahSpec", "ValueKind", "make_niah"]

ValueKind = Literal["number", "uuid", "word"]

ANSWER_TOKENS = 128
CHOICES = 10


@dataclass(frozen=True, kw_only=True)
class NiahSpec:
    """Which needle task.

    Attributes:
        name: of the task.
        essay: hidden in prose; else in the noise line.
        kind: what a value is.
        keys: how many keys have values.
        values: values of each key.
        asked: keys that are asked for.
    """

    name: TaskName
    essay: bool = True
    kind: ValueKind = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    @property
    def single(self) -> bool:
        """One needle and no other: it is scored as a choice among values too."""
        return self.keys == self.values == 1


@dataclass(frozen=True)
class _Needles:
    """What is hidden: (key, value) in the order of the text, their depths, and what is asked for."""

    pairs: list[tuple[str, str]]
    depths: list[float]
    asked: list[str]
    answers: list[str]


def make_niah(
    spec: NiahSpec, haystack: Haystack, *, seed: int, length: int, index: int, encode: Encode
) -> Question:
    """Question number ``index`` for a total of ``length`` tokens, ``ANSWER_TOKENS`` of them for the answer.

    Args:
        encode: token ids of a prompt, as a context begins.

    Raises:
        ValueError: the prompt without a haystack is longer than ``length`` allows.
    """
    rng = generator(seed, spec.name, length, index)
    drawn = spec.keys + spec.keys * spec.values + (CHOICES - 1 if spec.single else 0)
    keys = distinct(lambda: _value("word", rng), spec.keys, text=haystack.text)
    values = distinct(lambda: _value(spec.kind, rng), drawn - spec.keys, taken=keys, text=haystack.text)
    needles = _hide(spec, keys, values, haystack, rng)

    def build(words: int) -> str:
        parts = haystack.parts(words)
        return _prompt(spec, needles, _insert(spec, needles, parts, haystack))

    words, prompt, ids = fill(
        spec.name,
        build,
        encode,
        length=length,
        answer_tokens=ANSWER_TOKENS,
        most=WORDS_PER_TOKEN * length,
    )
    return _question(spec, needles, haystack, prompt=prompt, ids=ids, words=words, others=values)


def _value(kind: ValueKind, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _hide(
    spec: NiahSpec, keys: list[str], values: list[str], haystack: Haystack, rng: random.Random
) -> _Needles:
    pairs = [(keys[n // spec.values], values[n]) for n in range(spec.keys * spec.values)]
    asked = rng.sample(keys, spec.asked)
    answers = [value for key in asked for owner, value in pairs if owner == key]
    rng.shuffle(pairs)
    return _Needles(pairs, haystack.depths(rng, len(pairs)), asked, answers)


def _insert(spec: NiahSpec, needles: _Needles, parts: list[str], haystack: Haystack) -> str:
    """The haystack with its needles; from the last to the first, so that places stay what they are."""
    text, count = list(parts), len(parts)
    for (key, value), depth in reversed(list(zip(needles.pairs, needles.depths))):
        text.insert(
            haystack.place(depth, count), f"One of the special magic {spec.kind}s for {key} is: {value}."
        )
    return haystack.glue.join(text)


def _prompt(spec: NiahSpec, needles: _Needles, context: str) -> str:
    keys = needles.asked
    query = ", ".join(keys[:-1]) + (", and " if len(keys) > 1 else "") + keys[-1]
    plural = spec.asked * spec.values > 1
    kind = f"{spec.kind}s" if plural else spec.kind
    some, verb, what = ("Some", "are", "are all") if plural else ("A", "is", "is")
    return (
        f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What {what} the special magic {kind} for {query} mentioned in the provided text? "
        f"The special magic {kind} for {query} mentioned in the provided text {verb}"
    )


def _question(
    spec: NiahSpec,
    needles: _Needles,
    haystack: Haystack,
    *,
    prompt: str,
    ids: Ids,
    words: int,
    others: list[str],
) -> Question:
    count = len(haystack.parts(words))
    places = [
        haystack.place(depth, count) / max(count, 1)
        for (key, _), depth in zip(needles.pairs, needles.depths)
        if key in needles.asked
    ]
    return Question(
        prompt=prompt,
        ids=ids,
        answers=tuple(needles.answers),
        reply=" " + ", ".join(needles.answers),
        distractors=tuple(others[1:]) if spec.single else (),
        depth=sum(places) / len(places),
    )
