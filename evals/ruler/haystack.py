"""What needles are hidden in: one line repeated, or prose. Both are cut to a number of words."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from itertools import accumulate
from typing import Protocol

__all__ = ["DEPTHS", "NOISE", "Essay", "Haystack", "Noise", "noise_lines"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Where needles are put into prose, in percent of its sentences.
DEPTHS = tuple(round(100 * place / 39) for place in range(40))
_NOISE_WORDS = tuple(NOISE.split())
# A sentence ends at its mark and the quote or bracket behind it; a title's full stop ends none.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.) ")


class Haystack(Protocol):
    """Parts (lines, sentences) between which needles are put.

    Attributes:
        glue: what joins the parts.
        text: what no hidden value may stand in.
    """

    glue: str
    text: str

    def parts(self, words: int) -> list[str]:
        """The parts of the first ``words`` words; the last part may be cut short."""

    def depths(self, rng: random.Random, count: int) -> list[float]:
        """Where ``count`` needles go, increasing, as shares of the haystack."""

    def place(self, depth: float, parts: int) -> int:
        """How many of the parts come before a needle at ``depth``."""


def noise_lines(words: int) -> list[str]:
    """The noise line again and again, the last one cut so that there are ``words`` words."""
    lines, rest = divmod(words, len(_NOISE_WORDS))
    return [NOISE] * lines + ([" ".join(_NOISE_WORDS[:rest])] if rest else [])


class Noise:
    """One line repeated; a needle goes before a line, or to the end, each as likely."""

    glue, text = "\n", NOISE

    def parts(self, words: int) -> list[str]:
        """Lines."""
        return noise_lines(words)

    def depths(self, rng: random.Random, count: int) -> list[float]:
        """Uniform in [0, 1)."""
        return sorted(rng.random() for _ in range(count))

    def place(self, depth: float, parts: int) -> int:
        """Every place between lines has an equal share of [0, 1)."""
        return int(depth * (parts + 1))


class Essay:
    """Prose with its whitespace made single spaces; a text that ends too early starts again.

    Needles go to 40 depths spread over 0 to 100% of the sentences, no two of a prompt to the same.
    """

    glue = " "

    def __init__(self, text: str) -> None:
        self.words = text.split()
        assert self.words, "an essay has words: checked where it is read"
        self.text = " ".join(self.words)
        self._sentences = _SENTENCE_END.split(self.text)
        # Words up to the end of each sentence.
        self._ends = list(accumulate(len(sentence.split()) for sentence in self._sentences))

    def parts(self, words: int) -> list[str]:
        """Sentences."""
        times, rest = divmod(words, len(self.words))
        whole = bisect_right(self._ends, rest)
        before = self._ends[whole - 1] if whole else 0
        cut = [" ".join(self.words[before:rest])] if rest > before else []
        return self._sentences * times + self._sentences[:whole] + cut

    def depths(self, rng: random.Random, count: int) -> list[float]:
        """Of the 40."""
        return [percent / 100 for percent in sorted(rng.sample(DEPTHS, count))]

    def place(self, depth: float, parts: int) -> int:
        """Sentences before the needle."""
        return int(depth * parts)
