"""RULER's tasks: each one Task, all made by one function, scored as RULER does.

A prompt is read once into the model's state, and the answer is written from there; the score is the share of
the right answers that the lower-cased output contains. From the same state a single needle is also scored as
a choice among ten values of its form, which tells something about a model that has not learned to copy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evals.config import EvalConfig
from evals.oracle import OracleModel
from evals.ruler.catalogue import RULER, Maker, RulerTask
from evals.ruler.niah import CHOICES
from evals.ruler.question import Question
from evals.samples import Sample, clip, share
from evals.sampling import Sampling
from evals.scorer import Prefix, Scorer, TextCodec
from evals.states import context_ids
from evals.tasks.protocol import Result, Task
from trellis_dist.files import digest

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASKS", "Outcome", "ruler_task", "score_questions"]

CHANCE = 100.0 / CHOICES
ORACLE_PROMPTS = 8
# Tokens of the prompts that are kept at once.
KEPT_TOKENS = 2**22


@dataclass(frozen=True)
class Outcome:
    """One scored question: what was written, the share of the answers in it, which value was preferred."""

    output: str
    score: float
    chosen: str | None = None


def ruler_task(task: RulerTask) -> Task:
    """The entry of one of RULER's tasks."""
    return Task(
        name=task.name,
        settings=partial(_settings, task),
        run=partial(_run, task),
        scalars=partial(_scalars, task),
        chance=partial(_chance, task),
    )


def _settings(task: RulerTask, config: EvalConfig) -> dict[str, Any]:
    return {
        "lengths": sorted(set(config.ruler_lengths)),
        "samples": config.ruler_samples,
        "essay": digest(_essay(task, config)) if task.essay else "",
        "seed": config.ruler_seed,
    }


def _essay(task: RulerTask, config: EvalConfig) -> str:
    """The prose of a task that needs some. Raises ValueError (also for undecodable bytes) and OSError."""
    if not task.essay:
        return ""
    if not config.ruler_essay:
        raise ValueError(f"{task.name} hides needles in prose: set evals.ruler_essay, a text file")
    path = Path(config.ruler_essay)
    if not path.is_file():
        raise FileNotFoundError(f"evals.ruler_essay = {path}: no such file; name a text file of prose")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"evals.ruler_essay = {path}: not UTF-8 ({error}); name a text file") from None
    if not text.split():
        raise ValueError(f"evals.ruler_essay = {path}: the file holds no words; name one with prose")
    return text


def score_questions(
    scorer: Scorer, questions: Sequence[Question], *, answer_tokens: int, progress: tqdm[Any] | None = None
) -> list[Outcome]:
    """Read each prompt once; from its state write an answer and choose among the values, where there are any.

    A choice is right when the answer has the highest likelihood; its place among the ten is shuffled, so that
    ties go by chance.
    """

    def answer(prefix: Prefix) -> list[Outcome]:
        batch = [questions[place] for place in prefix.index]
        outputs = scorer.generate_from(prefix, Sampling(max_tokens=answer_tokens))
        chosen = _choose(scorer, prefix, batch)
        if progress is not None:
            progress.update(len(batch))
        return [
            Outcome(output, _match(question, output), choice)
            for question, output, choice in zip(batch, outputs, chosen)
        ]

    return scorer.each([question.ids for question in questions], answer)


def _match(question: Question, output: str) -> float:
    """Share of the answers that the lower-cased output contains (RULER's string_match_all)."""
    found = [answer.lower() in output.lower() for answer in question.answers]
    return sum(found) / len(found)


# Of a prompt, as many characters as tell how the value after it is encoded.
_END = 200


def _choose(scorer: Scorer, prefix: Prefix, questions: Sequence[Question]) -> list[str | None]:
    """The most likely of each question's values; None where it has no others."""
    orders = [_shuffled(question) for question in questions]
    encoded = [
        [scorer.encode_pair(question.prompt[-_END:], f" {value}")[1] for value in order]
        for question, order in zip(questions, orders)
    ]
    result: list[str | None] = []
    for order, scores in zip(orders, scorer.score_from(prefix, encoded)):
        best = max(range(len(order)), key=lambda place: scores[place].log_prob, default=None)
        result.append(None if best is None else order[best])
    return result


def _shuffled(question: Question) -> list[str]:
    values = [*question.answers, *question.distractors] if question.distractors else []
    random.Random(question.prompt).shuffle(values)
    return values


def _oracle(task: RulerTask, tokenizer: TextCodec, questions: Sequence[Question]) -> list[Outcome]:
    """The same scoring, of a model that knows the answers."""
    known = [(question.ids, tokenizer.encode(question.reply)) for question in questions]
    model = OracleModel(known, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    return score_questions(Scorer(model, tokenizer), questions, answer_tokens=task.answer_tokens)


def _run(task: RulerTask, subject: Subject, config: EvalConfig, progress: bool) -> Result:
    """Every length, then the oracle on the first prompts of the shortest."""
    tokenizer, scorer = subject.tokenizer, Scorer(subject.model, subject.tokenizer)
    make = task.questions(_essay(task, config))
    lengths = sorted(set(config.ruler_lengths))
    samples: list[Sample] = []
    checked: list[Question] = []
    total = len(lengths) * config.ruler_samples
    with tqdm(total=total, desc=task.name, unit="prompt", disable=not progress) as bar:
        for length in lengths:
            for first, questions in _questions(make, tokenizer, config, length=length):
                checked = checked or questions[:ORACLE_PROMPTS]
                outcomes = score_questions(scorer, questions, answer_tokens=task.answer_tokens, progress=bar)
                samples += [
                    _sample(question, outcome, f"{config.ruler_seed}/{length}/{index}", length=length)
                    for index, (question, outcome) in enumerate(zip(questions, outcomes), first)
                ]
    rows = [_row(task, length, [s for s in samples if s.length == length]) for length in lengths]
    return {
        "title": task.title,
        "groups": {str(row["length"]): row["generation"] for row in rows},
        "rows": rows,
        **_bounds(task, _oracle(task, tokenizer, checked), checked),
        "samples": [sample.to_json() for sample in samples],
    }


def _questions(
    make: Maker, tokenizer: TextCodec, config: EvalConfig, *, length: int
) -> Iterator[tuple[int, list[Question]]]:
    """The questions of one length, as many at a time as may be kept, each time with the first one's index."""
    encode = partial(context_ids, tokenizer)
    step = max(KEPT_TOKENS // length, 1)
    for start in range(0, config.ruler_samples, step):
        indices = range(start, min(start + step, config.ruler_samples))
        yield (
            start,
            [make(seed=config.ruler_seed, length=length, index=i, encode=encode) for i in indices],
        )


def _sample(question: Question, outcome: Outcome, name: str, *, length: int) -> Sample:
    details: dict[str, Any] = {"prompt_tokens": len(question.ids)}
    if outcome.chosen is not None:
        details |= {"choice": outcome.chosen, "chosen": outcome.chosen in question.answers}
    return Sample(
        id=name,
        group=str(length),
        score=outcome.score,
        prompt=clip(question.prompt),
        answer=", ".join(question.answers),
        output=outcome.output,
        length=length,
        depth=question.depth,
        details=details,
    )


def _row(task: RulerTask, length: int, samples: Sequence[Sample]) -> dict[str, Any]:
    row = {
        "length": length,
        "samples": len(samples),
        "prompt_tokens": fmean(sample.details["prompt_tokens"] for sample in samples),
        "generation": share([sample.score for sample in samples]),
    }
    if task.single:
        row["choice"] = share([float(sample.details["chosen"]) for sample in samples])
    return row


def _bounds(task: RulerTask, oracle: Sequence[Outcome], questions: Sequence[Question]) -> Result:
    """What a guess and a model that knows the answers score, in percent."""
    chance = {"generation": 0.0}
    perfect = {"samples": len(oracle), "generation": share([outcome.score for outcome in oracle])["score"]}
    if task.single:
        chance["choice"] = CHANCE
        right = [float(o.chosen in question.answers) for o, question in zip(oracle, questions)]
        perfect["choice"] = share(right)["score"]
    return {"chance": chance, "oracle": perfect}


def _scalars(task: RulerTask, result: Result) -> dict[str, float]:
    """Percent by length; of a single needle both ways of scoring it."""
    if not task.single:
        return {f"{task.name}/{length}": group["score"] for length, group in result["groups"].items()}
    return {
        f"{task.name}/{way}/{row['length']}": row[way]["score"]
        for row in result["rows"]
        for way in ("generation", "choice")
    }


def _chance(task: RulerTask, result: Result) -> dict[str, float]:
    """Nobody guesses what is written; of the choices one in ten is right."""
    chance = result["chance"]
    return {name: chance["choice" if "/choice/" in name else "generation"] for name in _scalars(task, result)}


TASKS = tuple(ruler_task(task) for task in RULER.values())
