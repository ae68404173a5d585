"""Single-needle prompts in the form of RULER (arXiv 2404.06654), deterministic by (seed, length, index).

    A special magic number is hidden within the following text. Make sure to memorize it. ...
    {haystack with "One of the special magic numbers for {key} is: {value}." at a random place}
    What is the special magic number for {key} mentioned in the provided text? The special magic number for
    {key} mentioned in the provided text is

The haystack is N words, cut from an endless repetition of the noise line or from prose; N is searched so that
the prompt and the room for its answer fill the wanted number of tokens. The search is a bisection: it ends.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from evals.config import Haystack, ValueKind

__all__ = ["ANSWER_TOKENS", "Needle", "NeedleSpec", "make_needle"]

ANSWER_TOKENS = 128
CHOICES = 10
# A prompt may fall short of its length by this share; it never exceeds it.
TOLERANCE = 0.01
DEPTHS = 40

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """
abundant ancient autumn bitter bold brave brief bright calm careful cheerful clever cold crisp curious
daring deep distant dusty eager early empty faint fierce final gentle golden grand hidden hollow humble icy
idle jolly keen late lively lonely loud lucky mellow misty modest narrow nimble noble odd pale patient plain
polite proud quick quiet rapid rare restless rough round rustic shallow sharp shy silent silver sleepy
slender smooth solemn steady stern sturdy sudden swift tall tender thin tidy vast vivid warm wild wise young
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
_NOUNS = """
anchor apple arrow autumn basket beacon bell bird blanket bottle branch bridge brook bucket butter cabin
candle canyon carpet castle cedar chapel cloud clover coast copper corner cottage desert dragon drum eagle
engine falcon feather fern field flute forest fountain garden gate glacier hammer harbor harvest hill island
ivory jacket jungle kettle ladder lagoon lantern lemon letter lily linen marble meadow mirror moon mountain
needle ocean orchard otter paddle palace pebble pepper piano pillow planet pocket pond prairie quarry rabbit
raven ribbon river saddle sailor shadow signal spoon stable station stone summit temple thunder timber tower
tunnel valley velvet village violin walnut whistle willow window winter
"""
NOUNS = tuple(_NOUNS.split())


@dataclass(frozen=True, kw_only=True)
class NeedleSpec:
    """Which needle task.

    Attributes:
        haystack: "noise" or "essay".
        essay: prose, for the essay haystack.
        value: what is hidden.
        seed: fixes keys, values and places.
    """

    haystack: Haystack = "noise"
    essay: str = ""
    value: ValueKind = "number"
    seed: int = 42


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        prompt: text that ends where the answer starts.
        answer: the hidden value.
        distractors: nine other values of the same form.
        tokens: prompt length in tokens as counted by ``count``.
        depth: share of the haystack (by lines or sentences) before the needle.
    """

    prompt: str
    answer: str
    distractors: tuple[str, ...]
    tokens: int
    depth: float


def make_needle(spec: NeedleSpec, *, length: int, index: int, count: Callable[[str], int]) -> Needle:
    """Prompt number ``index`` for a total of ``length`` tokens, ``ANSWER_TOKENS`` of them for the answer.

    Args:
        count: tokens of a prompt, BOS included.

    Raises:
        ValueError: the prompt without a haystack is longer than ``length`` allows.
    """
    rng = random.Random(f"{spec.seed}/{spec.haystack}/{spec.value}/{length}/{index}")
    key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    values = _distinct_values(spec.value, rng, key=key)
    place = rng.randrange(DEPTHS) / (DEPTHS - 1) if spec.haystack == "essay" else rng.random()

    def build(words: int) -> tuple[str, float]:
        hay, glue = _haystack(spec, words)
        at = round(place * len(hay)) if spec.haystack == "essay" else int(place * (len(hay) + 1))
        needle = f"One of the special magic {spec.value}s for {key} is: {values[0]}."
        text = glue.join([*hay[:at], needle, *hay[at:]])
        return _prompt(spec.value, key, text), at / max(len(hay), 1)

    words = _most_words(lambda n: count(build(n)[0]), length - ANSWER_TOKENS)
    if words is None:
        raise ValueError(
            f"needle length {length} is too short: the prompt alone takes {count(build(0)[0])} tokens and "
            f"its answer {ANSWER_TOKENS}; use a longer one"
        )
    prompt, depth = build(words)
    return Needle(prompt, values[0], tuple(values[1:]), count(prompt), depth)


def _prompt(kind: str, key: str, context: str) -> str:
    return (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What is the special magic {kind} for {key} mentioned in the provided text? "
        f"The special magic {kind} for {key} mentioned in the provided text is"
    )


def _haystack(spec: NeedleSpec, words: int) -> tuple[list[str], str]:
    """Places between which a needle fits (lines, or sentences of prose), and what joins them."""
    source = spec.essay.split() if spec.haystack == "essay" else NOISE.split()
    assert source, "an essay haystack has text: checked where it is read"
    if spec.haystack == "essay":
        taken = [source[i % len(source)] for i in range(words)]
        return [s for s in re.split(r"(?<=[.!?]) ", " ".join(taken)) if s], " "
    lines, rest = divmod(words, len(source))
    return [NOISE] * lines + ([" ".join(source[:rest])] if rest else []), "\n"


def _most_words(count: Callable[[int], int], budget: int) -> int | None:
    """About the largest number of words whose prompt has at most ``budget`` tokens; None if none has."""
    low, low_tokens = 0, count(0)
    if low_tokens > budget:
        return None
    high, high_tokens = budget, count(budget)
    while high_tokens <= budget:  # words shorter than one token each: none in practice
        high, high_tokens = 2 * high, count(2 * high)
    while high - low > 1 and budget - low_tokens > TOLERANCE * budget:
        # Tokens grow almost linearly with words; staying off the ends makes each step shrink the range.
        guess = low + (high - low) * (budget - low_tokens) // max(high_tokens - low_tokens, 1)
        guess = min(max(guess, low + 1), high - 1)
        tokens = count(guess)
        if tokens <= budget:
            low, low_tokens = guess, tokens
        else:
            high, high_tokens = guess, tokens
    return low


def _distinct_values(kind: ValueKind, rng: random.Random, *, key: str) -> list[str]:
    """The answer and its distractors, none of them the key: a word that stands in the question."""
    values: dict[str, None] = {}
    while len(values) < CHOICES:
        value = _value(kind, rng)
        if value != key:
            values[value] = None
    return list(values)


def _value(kind: ValueKind, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
