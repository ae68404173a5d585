"""One scored question, in the one form that tables, heat maps, the sample browser and comparisons read.

Two checkpoints are compared sample by sample, so a sample's id depends on the question alone: never on the
model, on the order of scoring or on how many were asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trellis_dist.validation import require

__all__ = ["TEXT_LIMIT", "Sample", "chance_of", "clip", "share"]

# Characters of a text that are kept with a sample: the middle of a longer one goes.
TEXT_LIMIT = 2000
_Z = 1.96  # of a 95% interval


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question, what was answered, and what that is worth.

    Attributes:
        id: identifies the question within the task, whatever model answers it.
        group: what is averaged: "piqa", or "4096" (a length of one needle task).
        score: from 0 (wrong) to 1 (right).
        prompt: the text that was read; `clip` cuts the middle of a long one.
        answer: the right answer.
        output: what the model wrote or chose.
        length: prompt length in tokens, where the task varies it.
        depth: share of the text before what is asked for, from 0 to 1, where the task varies it.
        details: further numbers and texts of this question (log-likelihoods by choice, say).
    """

    id: str
    group: str
    score: float
    prompt: str
    answer: str
    output: str
    length: int | None = None
    depth: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0.0 <= self.score <= 1.0, f"sample {self.id}: score = {self.score} is outside [0, 1]")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "details": dict(self.details)}


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """A text of about ``limit`` characters at most: of a longer one the start and the end."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def chance_of(samples: Sequence[Mapping[str, Any]]) -> float:
    """Mean share of a guess among the "choices" in the details of samples (as JSON); 0 for those without."""
    counts = [len(sample["details"].get("choices", ())) for sample in samples]
    return sum(1 / count for count in counts if count > 1) / len(counts) if counts else 0.0


def share(scores: Sequence[float]) -> dict[str, float]:
    """Mean of scores in percent with Wilson's 95% interval (for scores between 0 and 1: an approximation).

    Returns:
        "score", "low", "high" in percent, "samples" how many.
    """
    assert scores, "a mean of nothing"
    n, p = len(scores), sum(scores) / len(scores)
    middle = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n)) / (1 + _Z * _Z / n)
    # The ends are 0 and 100 exactly where the share is; rounding must not step outside.
    return {
        "score": 100 * p,
        "low": 100 * max(min(middle - half, p), 0.0),
        "high": 100 * min(max(middle + half, p), 1.0),
        "samples": n,
    }
