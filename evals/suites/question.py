"""One question of any suite: which continuations are scored after which contexts, and what that is worth.

The metrics are those of lm-evaluation-harness 0.4.13 (`ConfigurableTask.process_results`):

    acc       the most likely choice is the right one
    acc_norm  the same after each log-likelihood is divided by its choice's length in characters
    acc       of a question with one continuation: every token of it was the most probable one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trellis_dist.files import digest

__all__ = ["Answer", "Question", "ask"]

Request = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question whose answer is one of several continuations, or (LAMBADA) a single one.

    Attributes:
        id: hash of requests and gold: the same for a row in its original and in a preprocessed form.
        requests: (context, continuation) per choice; WinoGrande has several contexts and one continuation.
        choices: what people read, and whose characters acc_norm divides by: no delimiter is counted.
        gold: place of the right choice.
        prompt: what is shown as having been read.
    """

    id: str
    requests: tuple[Request, ...]
    choices: tuple[str, ...]
    gold: int
    prompt: str

    @property
    def lengths(self) -> tuple[int, ...]:
        """Characters of each choice."""
        return tuple(len(choice) for choice in self.choices)


@dataclass(frozen=True)
class Answer:
    """Per choice ln P(continuation | context) in nats, and whether all its tokens were the most probable."""

    log_probs: tuple[float, ...]
    greedy: tuple[bool, ...]

    def chosen(self, question: Question, metric: str) -> int:
        """Place of the choice that ``metric`` ("acc" or "acc_norm") prefers; of equals the first."""
        scores = np.array(self.log_probs)
        if metric == "acc_norm":
            with np.errstate(divide="ignore"):  # a choice without characters is never preferred
                scores = scores / np.array(question.lengths, dtype=float)
        return int(scores.argmax())

    def right(self, question: Question, metric: str) -> bool:
        """Whether the question counts for ``metric``."""
        if len(question.requests) == 1:
            return self.greedy[0]
        return self.chosen(question, metric) == question.gold


def ask(
    requests: Sequence[Request], gold: int, *, choices: Sequence[str], prompt: str | None = None
) -> Question:
    """A question with its id; ``prompt`` None shows the first context."""
    return Question(
        id=digest([requests, gold])[:16],
        requests=tuple(requests),
        choices=tuple(choices),
        gold=gold,
        prompt=requests[0][0] if prompt is None else prompt,
    )
