"""Windows of a named text, whose targets are the same bytes for every model, whatever its tokenizer.

Where a window lies is counted in characters: [context | target], the context with room for N tokens, N the
longest length that the text holds, the target from the next word on. Only then are both encoded, and of the
context the last tokens are taken. So the bits per byte of models with different tokenizers are of the same
bytes, with the same number of each one's own tokens before them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.scorer import Scorer
from evals.states import Ids, context_start

Array = NDArray[Any]

__all__ = ["ENOUGH", "Stretches", "Windows", "cut_stretches", "encode_stretches", "spread"]

# Characters of a context for each of its tokens: more than tokenizers put into one on average.
ROOM = 8
# Characters of a window after its context; the target begins within the first half of them.
TARGET = 1024
# So many windows inside single documents are enough to leave the others out.
ENOUGH = 8
_WORD = re.compile(r"(?<=\S)\s")


@dataclass(frozen=True)
class Windows:
    """Text to be scored: each row is context, then targets.

    Attributes:
        tokens: int64 [windows, longest + targets].
        is_target: bool of the same shape: False for the BOS of a document, and for padding at the end.
        longest: tokens of context.
        whole: each lies in one document; otherwise documents were put end to end.
        start: tokens that every context begins with, on top of its own.
    """

    tokens: Array
    is_target: Array
    longest: int
    whole: bool
    start: tuple[int, ...] = ()

    @property
    def scored(self) -> Array:
        """Which targets count: bool [windows, targets]."""
        found: Array = self.is_target[:, self.longest :]
        return found


@dataclass(frozen=True)
class Stretches:
    """Where the windows of a text lie.

    Attributes:
        pairs: a context, and the target that follows it.
        lengths: of those asked for, the ones that the text has room for.
        whole: as `Windows`.
    """

    pairs: list[tuple[str, str]]
    lengths: list[int]
    whole: bool

    @property
    def size(self) -> int:
        """UTF-8 bytes of all targets."""
        return sum(len(target.encode()) for _, target in self.pairs)


def spread(starts: Array, limit: int) -> Array:
    """At most ``limit`` of the starts, evenly, the first and the last among them."""
    chosen: Array = starts[np.linspace(0, len(starts) - 1, min(limit, len(starts))).round().astype(int)]
    return chosen


def cut_stretches(documents: Sequence[str], lengths: Sequence[int], *, limit: int) -> Stretches:
    """At most ``limit`` stretches, spread over the documents, or over all of them end to end.

    Raises:
        ValueError: the text is too short for the shortest length.
    """
    joined = "\n\n".join(documents)
    fitting = sorted(length for length in set(lengths) if ROOM * length + TARGET <= len(joined))
    if not fitting:
        raise ValueError(
            f"evals.context_lengths = {list(lengths)}: the text of evals.perplexity_text has {len(joined)} "
            f"characters and the shortest needs {ROOM} x {min(lengths)} + {TARGET}: use shorter ones, or "
            "more text"
        )
    width = ROOM * max(fitting) + TARGET
    whole = sum(len(text) // width for text in documents) >= min(limit, ENOUGH)
    places = [
        (text, start)
        for text in (documents if whole else [joined])
        for start in range(0, len(text) - width + 1, width)
    ]
    chosen = [places[i] for i in spread(np.arange(len(places)), limit)]
    return Stretches([_pair(text[start : start + width]) for text, start in chosen], fitting, whole)


def _pair(window: str) -> tuple[str, str]:
    """Context and target; a word that the middle of a window cuts belongs to the context.

    No context ends in whitespace: `Scorer.encode_pair` would score that with the target.
    """
    word = _WORD.search(window, len(window) - TARGET, len(window) - TARGET // 2)
    place = word.start() if word else len(window[: len(window) - TARGET].rstrip())
    return window[:place], window[place:]


def encode_stretches(scorer: Scorer, stretches: Stretches) -> tuple[Windows, list[int]]:
    """The windows for the longest length that the model can read, and all lengths that it can.

    Raises:
        ValueError: it cannot read the shortest.
    """
    encoded = [scorer.encode_pair(*pair) for pair in stretches.pairs]
    start = context_start(scorer.tokenizer, encoded[0][0][-1:])
    held = min(len(context) for context, _ in encoded) - len(start)
    targets = max(len(target) for _, target in encoded)
    if (most := getattr(scorer.model, "limit", None)) is not None:
        held = min(held, most - targets - len(start))
    lengths = [length for length in stretches.lengths if length <= held]
    if not lengths:
        raise ValueError(
            f"evals.context_lengths = {stretches.lengths}: with the targets the model reads {held} tokens of "
            "context at most; use shorter ones"
        )
    rows = [_row(context[-max(lengths) :], target, targets) for context, target in encoded]
    tokens, is_target = (np.stack(parts) for parts in zip(*rows))
    return Windows(tokens, is_target, max(lengths), stretches.whole, tuple(start)), lengths


def _row(context: Ids, target: Ids, targets: int) -> tuple[Array, Array]:
    """A context and its target, padded to so many targets, and what of it is no padding."""
    missing = targets - len(target)
    ids = np.array([*context, *target, *[0] * missing], np.int64)
    return ids, np.arange(len(ids)) < len(ids) - missing
