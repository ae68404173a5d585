"""One RULER question, and what the writers of questions share."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

__all__ = ["Encode", "Ids", "Question", "distinct", "generator"]

Ids = list[int]
Encode = Callable[[str], Ids]
# Draws for each wanted value; the pools hold thousands of times more than is ever wanted.
DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt and what answers it.

    Attributes:
        prompt: text that ends where the answer starts.
        ids: its tokens as the model reads them, with what starts a context.
        answers: what the output must contain; the score is the share of them that it does.
        reply: the answer as a model that knows it would write it.
        distractors: other values of the answer's form, for a choice; none for most tasks.
        depth: share of the haystack (by lines or sentences) before what is asked for, the mean of several.
    """

    prompt: str
    ids: Ids
    answers: tuple[str, ...]
    reply: str
    distractors: tuple[str, ...] = ()
    depth: float | None = None


def generator(*parts: object) -> random.Random:
    """The random stream of one question: of (seed, task, length, index)."""
    return random.Random("/".join(map(str, parts)))


def distinct(
    draw: Callable[[], str], count: int, *, taken: Collection[str] = (), text: str = ""
) -> list[str]:
    """``count`` draws of which none contains another or one ``taken``, or stands in these or in ``text``.

    An answer counts when the output contains it: an answer inside another value would count for that value.

    Raises:
        ValueError: the draws run out, which no real text brings about.
    """
    found: list[str] = []
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        value = draw()
        others = [*found, *taken]
        if value not in text and not any(value in other or other in value for other in others):
            found.append(value)
    if len(found) < count:
        raise ValueError("the text holds nearly every key or value that can be hidden: use another text")
    return found
