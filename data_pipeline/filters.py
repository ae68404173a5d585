"""Rules that drop whole documents: Gopher's quality and repetition rules, and the language.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A1.1.

    word        what lies between white space                        characters of a word    its code points
    line        not blank, white space around it left out            paragraph    lines up to a blank line

Where the paper leaves room: for n-grams the characters are those of words, without white space; of equal
lines, paragraphs and n-grams the first is no duplicate; a word in several n-grams counts once; an n-gram that
occurs once is no top n-gram, and of equally common ones the longest is, or the first of these.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import count

import numpy as np

from data_pipeline.config import FilterConfig
from data_pipeline.words import WORD, windows

__all__ = ["VERSION", "Filters"]

# Part of the content address: raise it when `Filters.reject` changes what it returns.
VERSION = 1

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# Dot, triangles, circle, squares; and what plain text uses instead.
BULLETS = tuple("\u2022\u2023\u25b6\u25c0\u25e6\u25a0\u25a1\u25aa\u25ab" + "-*\u2013")
ELLIPSES = ("...", "\u2026")
PARAGRAPH_END = re.compile(r"\n\s*\n")
TOP_SIZES, DUPLICATE_SIZES = (2, 3, 4), (5, 6, 7, 8, 9, 10)

Rule = tuple[str, Callable[["_Measures"], bool]]


class Filters:
    """The rules of a config that have a threshold.

    Attributes:
        rules: their names in the order they are tried, cheap ones first, "language" last.
    """

    def __init__(self, config: FilterConfig) -> None:
        """Raises ValueError for a language that py3langid does not know."""
        self._rules = (*_bounds(config), *_stop_words(config), *_ngrams(config), *_language(config))
        self.rules: tuple[str, ...] = tuple(name for name, _ in self._rules)

    def reject(self, text: str) -> str | None:
        """The first rule that drops `text`, or None. A value equal to its threshold is kept."""
        measures = _Measures(text)
        return next((name for name, drops in self._rules if drops(measures)), None)


def _bounds(config: FilterConfig) -> Iterator[Rule]:
    """Rules whose value is the measure of the same name."""
    for key in (
        "min_words",
        "max_words",
        "max_symbol_ratio",
        "min_mean_word_length",
        "max_mean_word_length",
        "min_alphabetic_words",
        "max_bullet_lines",
        "max_ellipsis_lines",
        "max_duplicate_lines",
        "max_duplicate_line_characters",
        "max_duplicate_paragraphs",
        "max_duplicate_paragraph_characters",
    ):
        threshold = getattr(config, key)
        if threshold is not None:
            yield _bound(key, threshold)


def _bound(key: str, threshold: float) -> Rule:
    kind, _, measure = key.partition("_")
    name = key if measure in ("words", "mean_word_length") else measure
    if kind == "min":
        return name, lambda measures: getattr(measures, measure) < threshold
    return name, lambda measures: getattr(measures, measure) > threshold


def _stop_words(config: FilterConfig) -> Iterator[Rule]:
    least = config.min_stop_words
    if least is not None:
        yield "stop_words", lambda measures: not measures.has_stop_words(least)


def _ngrams(config: FilterConfig) -> Iterator[Rule]:
    for n, share in zip(TOP_SIZES, config.max_top_ngrams):
        yield f"top_{n}_grams", partial(_top, n, share)
    for n, share in zip(DUPLICATE_SIZES, config.max_duplicate_ngrams):
        yield f"duplicate_{n}_grams", partial(_duplicate, n, share)


def _top(n: int, most: float, measures: _Measures) -> bool:
    return measures.repeats.top(n) > most


def _duplicate(n: int, most: float, measures: _Measures) -> bool:
    return measures.repeats.duplicate(n) > most


def _language(config: FilterConfig) -> Iterator[Rule]:
    if not config.languages:
        return
    from data_pipeline.language import identify, languages

    unknown = sorted(set(config.languages) - languages())
    if unknown:
        raise ValueError(
            f"data.filters.languages: no {', '.join(unknown)}; there are {', '.join(sorted(languages()))}"
        )

    def drops(measures: _Measures) -> bool:
        code, probability = identify(measures.text)
        return code not in config.languages or probability < config.language_confidence

    yield "language", drops


class _Measures:
    """What the rules look at in one document, each measured when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, list[str]]:
        """Words as int64 [words], numbers of the distinct words."""
        numbering, ids = defaultdict[str, int](count().__next__), array("q")
        for window in windows(self.text):
            ids.extend(map(numbering.__getitem__, window.split()))
        return np.frombuffer(ids, np.int64), list(numbering)

    @cached_property
    def words(self) -> int:
        return len(self._numbered[0])

    @cached_property
    def _lengths(self) -> np.ndarray:
        """int64 [words]: characters of each word."""
        ids, distinct = self._numbered
        lengths: np.ndarray = np.fromiter(map(len, distinct), np.int64, len(distinct))[ids]
        return lengths

    @property
    def mean_word_length(self) -> float:
        return _share(int(self._lengths.sum()), self.words)

    @property
    def alphabetic_words(self) -> float:
        ids, distinct = self._numbered
        letters = [word[0].isalpha() or any(map(str.isalpha, word)) for word in distinct]
        return _share(int(np.array(letters, bool)[ids].sum()), self.words)

    def has_stop_words(self, least: int) -> bool:
        """Whether so many different ones occur, in any case and beside any punctuation."""
        distinct = self._numbered[1]
        if len(STOP_WORDS.intersection(distinct)) >= least:  # nearly always, and much quicker
            return True
        return len(STOP_WORDS.intersection(WORD.findall(" ".join(distinct).lower()))) >= least

    @property
    def symbol_ratio(self) -> float:
        most = max(self.text.count("#"), sum(map(self.text.count, ELLIPSES)))
        return _share(most, self.words)

    @cached_property
    def _lines(self) -> list[str]:
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @property
    def bullet_lines(self) -> float:
        return _share(sum(line.startswith(BULLETS) for line in self._lines), len(self._lines))

    @property
    def ellipsis_lines(self) -> float:
        return _share(sum(line.endswith(ELLIPSES) for line in self._lines), len(self._lines))

    @cached_property
    def _duplicate_lines(self) -> tuple[float, float]:
        return _duplicates(self._lines)

    @cached_property
    def _duplicate_paragraphs(self) -> tuple[float, float]:
        return _duplicates([part for part in map(str.strip, PARAGRAPH_END.split(self.text)) if part])

    @property
    def duplicate_lines(self) -> float:
        return self._duplicate_lines[0]

    @property
    def duplicate_line_characters(self) -> float:
        return self._duplicate_lines[1]

    @property
    def duplicate_paragraphs(self) -> float:
        return self._duplicate_paragraphs[0]

    @property
    def duplicate_paragraph_characters(self) -> float:
        return self._duplicate_paragraphs[1]

    @cached_property
    def repeats(self) -> _Repeats:
        return _Repeats(self._numbered[0], self._lengths)


class _Repeats:
    """The n-grams that occur more than once, for growing n: those of n + 1 words begin with one of n words.

    So after one pass over the words little is left to look at, in text that repeats little.
    """

    def __init__(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Word numbers and lengths in characters, int64 [words]."""
        self._ids, self._size = ids, int(ids.max(initial=0)) + 1
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._n = 1
        # int64 [found]: word where a repeated n-gram begins, by group, then ascending; for 1 word ascending
        self._at = np.flatnonzero((np.bincount(ids) > 1)[ids])
        self._group = ids[self._at]  # int64 [found]: which n-gram it is
        self._later = np.zeros(0, bool)  # bool [found]: it stood before; from 2 words on

    def top(self, n: int) -> float:
        """Share of the characters in the commonest n-gram."""
        self._advance(n)
        if not len(self._at):
            return 0.0
        counts = np.bincount(self._group)[self._group]
        common = np.flatnonzero(counts == counts.max())
        characters = self._ends[self._at[common] + n] - self._ends[self._at[common]]
        longest = common[characters == characters.max()]
        first = longest[self._at[longest].argmin()]
        return self._covered(self._at[self._group == self._group[first]])

    def duplicate(self, n: int) -> float:
        """Share of the characters in n-grams that stood before."""
        self._advance(n)
        return self._covered(self._at[self._later])

    def _advance(self, n: int) -> None:
        """Go on to n-grams of `n` words, which only grows. Groups are exact: pairs of numbers, no hashes."""
        while self._n < n:
            self._n += 1
            if not len(self._at):
                continue
            inside = self._at + self._n <= len(self._ids)
            at = self._at[inside]
            key = self._group[inside] * self._size + self._ids[at + self._n - 1]
            order = np.argsort(key, kind="stable")  # so that places stay in order inside a group
            at, key = at[order], key[order]
            new = np.concatenate(
                [[True], key[1:] != key[:-1], [True]]
            )  # the n-gram's first; one past the end
            kept = ~(new[:-1] & new[1:])
            self._at, self._later = at[kept], ~new[:-1][kept]
            self._group = np.cumsum(new[:-1])[kept]

    def _covered(self, at: np.ndarray) -> float:
        """Share of the characters in the words of the n-grams that begin at `at`, each counted once."""
        if not len(at):
            return 0.0
        at = np.sort(at)
        stops = at + self._n
        starts = np.maximum(at, np.concatenate([[0], stops[:-1]]))
        return int((self._ends[stops] - self._ends[starts]).sum()) / int(self._ends[-1])


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that stood before."""
    distinct = set(parts)
    characters = sum(map(len, parts))
    return (
        _share(len(parts) - len(distinct), len(parts)),
        _share(characters - sum(map(len, distinct)), characters),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
