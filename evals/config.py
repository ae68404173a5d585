"""The evals section of a recipe: what a checkpoint is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT, require

TaskName = Literal[
    "perplexity", "needle", "decode", "sample", "harness",
    "lambada", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa",
]  # fmt: skip
Haystack = Literal["noise", "essay"]
ValueKind = Literal["number", "uuid", "word"]
Device = Literal["auto", "cpu", "cuda"]

__all__ = ["Device", "EvalConfig", "Haystack", "TaskName", "ValueKind"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring of a finished (or saved) run.

    Attributes:
        tasks: any of "perplexity" (held-out bits per byte beside n-grams), "needle", "decode" (state bytes
            and ms per token by position, beside softmax attention), "sample" (a continuation), "harness"
            (tasks of lm-evaluation-harness from local files).
        device: "auto" takes a CUDA device when there is one.
        ngram_max_tokens: training tokens the n-gram baselines are counted on; 0 counts all.
        needle_lengths: prompt lengths in tokens, 256 or more, 128 of them for the answer.
        needle_samples: prompts per length.
        needle_haystack: "noise" or "essay" (prose read from needle_essay).
        needle_essay: a UTF-8 text file of prose, for the essay haystack.
        needle_value: what is hidden: a 7-digit "number", a "uuid" or a "word".
        needle_seed: fixes keys, values and places.
        decode_positions: positions at which decoding is measured.
        sample_tokens: tokens of the sample continuation.
        sample_temperature: 0 is greedy.
        sample_top_p: sample among the most probable tokens that hold this mass.
        sample_seed: of the sample's draws.
        suites_folder: holds <suite>.jsonl (or .json, .parquet) of the suites among tasks ("lambada", "piqa",
            "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa"); None loads each from the Hugging
            Face Hub at a fixed commit.
        suites_limit: questions per suite, the first ones; 0 takes all.
        harness_folder: folder of lm-evaluation-harness YAML files, trusted like code.
        harness_tasks: names of tasks in that folder.
        harness_limit: questions per harness task; 0 takes all.
    """

    __pydantic_config__ = STRICT

    tasks: tuple[TaskName, ...] = ("perplexity", "needle", "decode", "sample")
    device: Device = "auto"
    ngram_max_tokens: int = 0
    needle_lengths: tuple[int, ...] = (1024, 2048, 4096)
    needle_samples: int = 50
    needle_haystack: Haystack = "noise"
    needle_essay: str | None = None
    needle_value: ValueKind = "number"
    needle_seed: int = 42
    decode_positions: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    sample_tokens: int = 128
    sample_temperature: float = 0.8
    sample_top_p: float = 0.95
    sample_seed: int = 0
    suites_folder: str | None = None
    suites_limit: int = 0
    harness_folder: str | None = None
    harness_tasks: tuple[str, ...] = ()
    harness_limit: int = 0

    def __post_init__(self) -> None:
        require(
            self.needle_samples >= 1, f"evals.needle_samples = {self.needle_samples}: use 1 or more prompts"
        )
        require(
            bool(self.needle_lengths) and min(self.needle_lengths) >= 256,
            f"evals.needle_lengths = {list(self.needle_lengths)}: use 256 or more; 128 tokens are room for "
            "the answer and the question takes about 100",
        )
        require(
            self.needle_haystack != "essay" or bool(self.needle_essay),
            'evals.needle_haystack = "essay" needs evals.needle_essay, a text file of prose',
        )
        positions = self.decode_positions
        require(
            bool(positions) and positions[0] >= 1 and list(positions) == sorted(set(positions)),
            f"evals.decode_positions = {positions}: use increasing positions of 1 or more",
        )
        require(self.ngram_max_tokens >= 0, f"evals.ngram_max_tokens = {self.ngram_max_tokens}: use 0 (all)")
        require(self.sample_tokens >= 1, f"evals.sample_tokens = {self.sample_tokens}: use 1 or more")
        require(
            self.sample_temperature >= 0,
            f"evals.sample_temperature = {self.sample_temperature}: use 0 (greedy) or more",
        )
        require(
            0 < self.sample_top_p <= 1, f"evals.sample_top_p = {self.sample_top_p}: use a share in (0, 1]"
        )
        require(self.suites_limit >= 0, f"evals.suites_limit = {self.suites_limit}: use 0 (all) or more")
        require(
            "harness" not in self.tasks or bool(self.harness_folder and self.harness_tasks),
            'evals.tasks names "harness": set evals.harness_folder and evals.harness_tasks',
        )
        require(self.harness_limit >= 0, f"evals.harness_limit = {self.harness_limit}: use 0 (all) or more")
