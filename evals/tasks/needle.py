"""RULER's single needle, scored as generation and as a choice among ten values of the same form."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evals.config import EvalConfig
from evals.needles import ANSWER_TOKENS, CHOICES, Needle, NeedleSpec, make_needle
from evals.oracle import OracleModel
from evals.sampling import Sampling
from evals.scorer import CausalLM, Prefix, Scorer, TextCodec
from evals.tasks.protocol import Result, Task
from trellis_dist.files import digest

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASK", "NeedleOutcome", "score_needles"]

CHANCE = 100.0 / CHOICES
ORACLE_PROMPTS = 8
# Prompts prefilled and decoded together.
BATCH = 25


@dataclass(frozen=True)
class NeedleOutcome:
    """One scored prompt: what was written, whether it holds the answer, whether the answer was preferred."""

    output: str
    generated: bool
    chosen: bool


def _settings(config: EvalConfig) -> dict[str, Any]:
    return {
        "lengths": sorted(config.needle_lengths),
        "samples": config.needle_samples,
        "haystack": config.needle_haystack,
        "essay": _essay_digest(config),
        "value": config.needle_value,
        "seed": config.needle_seed,
    }


def _essay_digest(config: EvalConfig) -> str:
    return digest(_essay(config)) if config.needle_haystack == "essay" else ""


def _essay(config: EvalConfig) -> str:
    """The prose of the essay haystack. Raises ValueError (also for undecodable bytes) and OSError."""
    if config.needle_haystack != "essay":
        return ""
    path = Path(config.needle_essay or "")
    if not path.is_file():
        raise FileNotFoundError(f"evals.needle_essay = {path}: no such file; name a text file of prose")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"evals.needle_essay = {path}: not UTF-8 ({error}); name a text file") from None
    if not text.split():
        raise ValueError(f"evals.needle_essay = {path}: the file holds no words; name one with prose")
    return text


def score_needles(model: CausalLM, tokenizer: TextCodec, needles: Sequence[Needle]) -> list[NeedleOutcome]:
    """Read each prompt once; from its state score the ten values and write an answer.

    Generation counts when the answer is contained in the lower-cased output (RULER). The choice counts when
    the answer has the highest likelihood; its place among the ten is shuffled, so that ties go by chance.
    """
    scorer = Scorer(model, tokenizer)
    prompts = [prompt_ids(tokenizer, needle) for needle in needles]
    outcomes: list[NeedleOutcome | None] = [None] * len(needles)
    for prefix in scorer.prefixes(prompts):
        batch = [needles[i] for i in prefix.index]
        outputs = scorer.generate_from(prefix, Sampling(max_tokens=ANSWER_TOKENS))
        for i, output, chosen in zip(prefix.index, outputs, _choose(scorer, prefix, batch)):
            generated = needles[i].answer.lower() in output.lower()
            outcomes[i] = NeedleOutcome(output, generated, chosen)
    return [outcome for outcome in outcomes if outcome is not None]


def _choose(scorer: Scorer, prefix: Prefix, needles: Sequence[Needle]) -> list[bool]:
    orders = [_shuffled(needle) for needle in needles]
    encoded = [[scorer.tokenizer.encode(f" {value}") for value in order] for order in orders]
    result = []
    for needle, order, scores in zip(needles, orders, scorer.score_from(prefix, encoded)):
        best = max(range(len(order)), key=lambda c: scores[c].log_prob)
        result.append(order[best] == needle.answer)
    return result


def _shuffled(needle: Needle) -> list[str]:
    values = [needle.answer, *needle.distractors]
    random.Random(needle.prompt).shuffle(values)
    return values


def prompt_ids(tokenizer: TextCodec, needle: Needle) -> list[int]:
    """[BOS] prompt."""
    return [tokenizer.bos_id, *tokenizer.encode(needle.prompt)]


def _oracle(tokenizer: TextCodec, needles: Sequence[Needle]) -> list[NeedleOutcome]:
    """The same scoring, of a model that copies the answer."""
    known = [(prompt_ids(tokenizer, n), tokenizer.encode(f" {n.answer}")) for n in needles]
    model = OracleModel(known, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    return score_needles(model, tokenizer, needles)


def _percent(flags: Sequence[bool]) -> dict[str, float]:
    """Share in percent with its Wilson 95% interval."""
    n, p, z = len(flags), sum(flags) / len(flags), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are 0 and 100 exactly where the share is; rounding must not step outside.
    return {
        "score": 100 * p,
        "low": 100 * max(min(middle - half, p), 0.0),
        "high": 100 * min(max(middle + half, p), 1.0),
    }


def _row(length: int, needles: Sequence[Needle], outcomes: Sequence[NeedleOutcome]) -> dict[str, Any]:
    return {
        "length": length,
        "samples": len(needles),
        "prompt_tokens": sum(needle.tokens for needle in needles) / len(needles),
        "generation": _percent([outcome.generated for outcome in outcomes]),
        "choice": _percent([outcome.chosen for outcome in outcomes]),
    }


def _run(subject: Subject, config: EvalConfig, progress: bool) -> Result:
    """Every length, then the oracle on the first prompts of the shortest."""
    tokenizer = subject.tokenizer
    spec = NeedleSpec(
        haystack=config.needle_haystack,
        essay=_essay(config),
        value=config.needle_value,
        seed=config.needle_seed,
    )

    def count(text: str) -> int:
        return 1 + len(tokenizer.encode(text))

    rows, samples = [], []
    checked: list[Needle] = []
    total = len(config.needle_lengths) * config.needle_samples
    with tqdm(total=total, desc="needle", unit="prompt", disable=not progress) as bar:
        for length in sorted(config.needle_lengths):
            needles, outcomes = [], []
            for start in range(0, config.needle_samples, BATCH):
                indices = range(start, min(start + BATCH, config.needle_samples))
                part = [make_needle(spec, length=length, index=i, count=count) for i in indices]
                needles += part
                outcomes += score_needles(subject.model, tokenizer, part)
                bar.update(len(part))
            checked = checked or needles[:ORACLE_PROMPTS]
            rows.append(_row(length, needles, outcomes))
            samples += [_sample(length, n, o) for n, o in zip(needles, outcomes)]
    oracle = _oracle(tokenizer, checked)
    return {
        "rows": rows,
        "chance": {"generation": 0.0, "choice": CHANCE},
        "oracle": {
            "samples": len(oracle),
            "generation": _percent([o.generated for o in oracle])["score"],
            "choice": _percent([o.chosen for o in oracle])["score"],
        },
        "samples": samples,
    }


def _sample(length: int, needle: Needle, outcome: NeedleOutcome) -> dict[str, Any]:
    return {
        "length": length,
        "depth": needle.depth,
        "answer": needle.answer,
        "output": outcome.output,
        "generated": outcome.generated,
        "chosen": outcome.chosen,
    }


def _scalars(result: Result) -> dict[str, float]:
    return {
        f"needle/{kind}/{row['length']}": row[kind]["score"]
        for row in result["rows"]
        for kind in ("generation", "choice")
    }


TASK = Task(name="needle", settings=_settings, run=_run, scalars=_scalars)
