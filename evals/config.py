"""The evals section of a recipe: what a checkpoint is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trellis_dist.validation import STRICT, require

TaskName = Literal[
    "perplexity", "context_length", "decode", "sample", "harness",
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_single_word",
    "niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt", "cwe", "mqar",
    "lambada", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "siqa",
]  # fmt: skip
Device = Literal["auto", "cpu", "cuda"]
PeerBos = Literal["tokenizer", "always"]

__all__ = ["ESSAY_TASKS", "Device", "EvalConfig", "PeerBos", "TaskName"]

# RULER's tasks that hide needles in prose.
ESSAY_TASKS: tuple[TaskName, ...] = (
    "niah_single_2",
    "niah_single_3",
    "niah_single_word",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
)
# Tokens that hold a prompt with its answer and some haystack: of four needles, of a solved example.
_LEAST_LENGTH: dict[TaskName, int] = {
    "niah_multikey_1": 512,
    "niah_multivalue": 512,
    "niah_multiquery": 512,
    "vt": 1024,
    "cwe": 1024,
}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring of a finished (or saved) run.

    Attributes:
        tasks: any of "perplexity" (held-out bits per byte beside n-grams), "context_length" (the loss of the
            same held-out tokens, given more and more of what stands before them), "decode" (state bytes and
            ms per token by position, beside softmax attention), "sample" (a continuation), "harness" (tasks
            of lm-evaluation-harness from local files); of RULER "niah_single_1" (a number in noise),
            "niah_single_2", "niah_single_3", "niah_single_word" (a number, a UUID, a word in prose),
            "niah_multikey_1", "niah_multivalue", "niah_multiquery" (four needles in prose), "vt" (variable
            tracking), "cwe" (common words); "mqar" (multi-query associative recall).
        device: "auto" takes a CUDA device when there is one.
        peer_bos: what starts a context of a Hugging Face model: "tokenizer" what its tokenizer puts before a
            text by itself, be it nothing, as lm-evaluation-harness does; "always" BOS (EOS where there is
            none). An empty context is BOS in both.
        perplexity_text: a .txt or .jsonl file, or a folder of them, on which "perplexity" and
            "context_length" score any model, a run beside its own held-out text: each .txt file is a
            document, and each line of a .jsonl file, under "text".
        perplexity_length: tokens of its rows; 0 takes the run's data.sequence_length, and 2048 of another
            model (fewer where it has fewer positions).
        ngram_max_tokens: training tokens the n-gram baselines are counted on; 0 counts all.
        context_lengths: tokens of context before the targets, 1 or more; those that the held-out text does
            not hold are left out.
        context_documents: windows of held-out text for it, at most.
        ruler_lengths: of RULER's tasks: prompt lengths in tokens, 256 or more, room for the answer included.
        ruler_samples: prompts per length.
        ruler_essay: a UTF-8 text file of prose, for the tasks that hide needles in prose.
        ruler_seed: fixes keys, values and places.
        mqar_pairs: key-value pairs of a row, each asked for once.
        mqar_length: tokens of a row, even; at least four per pair.
        mqar_samples: rows per number of pairs and length.
        mqar_seed: fixes keys, values and places.
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

    tasks: tuple[TaskName, ...] = ("perplexity", "niah_single_1", "decode", "sample")
    device: Device = "auto"
    peer_bos: PeerBos = "tokenizer"
    perplexity_text: str | None = None
    perplexity_length: int = 0
    ngram_max_tokens: int = 0
    context_lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)
    context_documents: int = 32
    ruler_lengths: tuple[int, ...] = (1024, 2048, 4096)
    ruler_samples: int = 50
    ruler_essay: str | None = None
    ruler_seed: int = 42
    mqar_pairs: tuple[int, ...] = (4, 16, 64)
    mqar_length: tuple[int, ...] = (256, 512)
    mqar_samples: int = 100
    mqar_seed: int = 0
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
        self._check_ruler()
        self._check_mqar()
        lengths = list(self.context_lengths)
        require(
            bool(lengths) and min(lengths) >= 1,
            f"evals.context_lengths = {lengths}: use 1 or more tokens of context",
        )
        require(
            self.context_documents >= 1,
            f"evals.context_documents = {self.context_documents}: use 1 or more windows of text",
        )
        positions = self.decode_positions
        require(
            bool(positions) and positions[0] >= 1 and list(positions) == sorted(set(positions)),
            f"evals.decode_positions = {positions}: use increasing positions of 1 or more",
        )
        length = self.perplexity_length
        require(length >= 0, f"evals.perplexity_length = {length}: use tokens of a row, or 0 (the model's)")
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

    def _check_ruler(self) -> None:
        require(self.ruler_samples >= 1, f"evals.ruler_samples = {self.ruler_samples}: use 1 or more prompts")
        for task in ("niah_single_1", *self.tasks):
            least = _LEAST_LENGTH.get(task, 256)
            require(
                bool(self.ruler_lengths) and min(self.ruler_lengths) >= least,
                f"evals.ruler_lengths = {list(self.ruler_lengths)}: use {least} or more for {task}, whose "
                "question and answer take most of that",
            )
            require(
                task not in ESSAY_TASKS or bool(self.ruler_essay),
                f'evals.tasks names "{task}": set evals.ruler_essay, a text file of prose',
            )

    def _check_mqar(self) -> None:
        require(self.mqar_samples >= 1, f"evals.mqar_samples = {self.mqar_samples}: use 1 or more rows")
        require(self.mqar_seed >= 0, f"evals.mqar_seed = {self.mqar_seed}: use 0 or more")
        require(
            bool(self.mqar_pairs) and min(self.mqar_pairs) >= 1,
            f"evals.mqar_pairs = {list(self.mqar_pairs)}: use 1 or more pairs",
        )
        least = 4 * max(self.mqar_pairs)
        require(
            bool(self.mqar_length) and all(n >= least and n % 2 == 0 for n in self.mqar_length),
            f"evals.mqar_length = {list(self.mqar_length)}: use even numbers of {least} or more, four tokens "
            f"for each of the {max(self.mqar_pairs)} pairs, or fewer evals.mqar_pairs",
        )
