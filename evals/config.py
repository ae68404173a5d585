"""The evals section of a recipe: what a checkpoint is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT

TaskName = Literal["perplexity", "needle", "decode", "sample"]

__all__ = ["EvalConfig", "TaskName"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring of a finished (or saved) run.

    Attributes:
        tasks: any of "perplexity" (held-out bits per byte beside n-grams), "needle", "decode" (state bytes and
            ms per token by position, beside softmax attention), "sample" (a continuation).
        needle_lengths: prompt lengths in tokens.
        needle_samples: prompts per length.
        decode_positions: positions at which decoding is measured.
        sample_tokens: tokens of the sample continuation.
    """

    __pydantic_config__ = STRICT

    tasks: tuple[TaskName, ...] = ("perplexity", "needle", "decode", "sample")
    needle_lengths: tuple[int, ...] = (1024, 2048, 4096)
    needle_samples: int = 50
    decode_positions: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        if self.needle_samples < 1:
            raise ValueError(f"evals.needle_samples = {self.needle_samples}: use 1 or more prompts")
        if any(n < 128 for n in self.needle_lengths):
            raise ValueError(f"evals.needle_lengths = {self.needle_lengths}: a needle prompt needs 128 tokens or more")
