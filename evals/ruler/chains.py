"""Variable tracking: a value is assigned once and handed on four times; its variables are asked for.

    Memorize and track the chain(s) of variable assignment hidden in the following text.

    {noise lines with "VAR ABCDE = 12345", "VAR FGHIJ = VAR ABCDE ", ... among them, in this order}
    Question: Find all variables that are assigned the value 12345 in the text above. Answer: According to
    the chain(s) of variable assignment in the text above, 5 variables are assigned the value 12345, they are:

A solved example of up to 500 tokens, with names of three letters, comes before. The space that ends the
prompt in the reference is left to the model: tokenizers put a space at the start of the word behind it.
"""

from __future__ import annotations

import random
import string

from evals.ruler.fit import WORDS_PER_TOKEN, fill, fit
from evals.ruler.haystack import noise_lines
from evals.ruler.question import Encode, Question, distinct, generator

__all__ = ["ANSWER_TOKENS", "EXAMPLE_TOKENS", "make_chain"]

ANSWER_TOKENS, EXAMPLE_TOKENS = 30, 500
HOPS = 4
NAME_LETTERS, EXAMPLE_LETTERS = 5, 3


class _Chain:
    """A value, the variables that it goes through, and where the assignments stand."""

    def __init__(self, rng: random.Random, letters: int, *, other_value: str = "") -> None:
        self.names = distinct(
            lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), HOPS + 1, taken=("VAR",)
        )
        (self.value,) = distinct(
            lambda: str(rng.randint(10_000, 99_998)), 1, taken=(other_value,) if other_value else ()
        )
        self._depths = sorted(rng.random() for _ in self.names)

    def assignments(self) -> list[str]:
        """The lines, in order."""
        hops = [f"VAR {new} = VAR {old} " for old, new in zip(self.names, self.names[1:])]
        return [f"VAR {self.names[0]} = {self.value}", *hops]

    def places(self, lines: int) -> list[int]:
        """How many noise lines come before each assignment: different numbers where there are enough."""
        last = len(self._depths) - 1
        free = max(lines + 1 - last, 1)
        return [min(int(depth * free) + i, lines) for i, depth in enumerate(self._depths)]

    def prompt(self, words: int) -> str:
        """The question over ``words`` words of noise."""
        lines = [f"{line}\n" for line in noise_lines(words)]
        for place, assignment in reversed(list(zip(self.places(len(lines)), self.assignments()))):
            lines.insert(place, assignment)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{' '.join(lines)}\n"
            f"Question: Find all variables that are assigned the value {self.value} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(self.names)} variables are assigned the value {self.value}, they are:"
        )

    def reply(self) -> str:
        """What answers the prompt."""
        return " " + " ".join(self.names)


def make_chain(*, seed: int, length: int, index: int, encode: Encode) -> Question:
    """Question number ``index`` for a total of ``length`` tokens, ``ANSWER_TOKENS`` of them for the answer.

    Raises:
        ValueError: the example and the question without noise are longer than ``length`` allows.
    """
    rng = generator(seed, "vt", length, index)
    chain = _Chain(rng, NAME_LETTERS)
    example = _example(_Chain(rng, EXAMPLE_LETTERS, other_value=chain.value), encode)

    def build(words: int) -> str:
        return f"{example}\n\n{chain.prompt(words)}"

    words, prompt, ids = fill(
        "vt",
        build,
        encode,
        length=length,
        answer_tokens=ANSWER_TOKENS,
        most=WORDS_PER_TOKEN * length,
    )
    lines = len(noise_lines(words))
    depth = sum(chain.places(lines)) / len(chain.names) / max(lines, 1)
    return Question(prompt=prompt, ids=ids, answers=tuple(chain.names), reply=chain.reply(), depth=depth)


def _example(chain: _Chain, encode: Encode) -> str:
    """A solved question of up to ``EXAMPLE_TOKENS`` tokens; without noise where even that is longer."""

    def build(words: int) -> str:
        return chain.prompt(words) + chain.reply()

    fitted = fit(lambda n: encode(build(n)), EXAMPLE_TOKENS, most=WORDS_PER_TOKEN * EXAMPLE_TOKENS)
    return build(fitted[0] if fitted else 0)
