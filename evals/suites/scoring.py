"""Questions scored in blocks, and what a suite's answers amount to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tqdm import tqdm

from evals.samples import Sample, clip, share
from evals.scorer import Scorer
from evals.suites.catalogue import Suite
from evals.suites.question import Answer, Question

__all__ = ["answer_questions", "perplexity", "sample_of", "share_of"]

# Questions whose requests are encoded and scored together: bounds memory, and is batches for several ranks.
BLOCK = 512
# e to the power of more than this is no float; lm-evaluation-harness fails there.
MAX_NATS = 700.0
_Z = 1.96  # of a 95% interval


def answer_questions(
    scorer: Scorer, questions: Sequence[Question], *, progress: bool = False, desc: str = ""
) -> list[Answer]:
    """One answer per question, in their order. A question's choices continue one prefilled state.

    Raises:
        ValueError: a log-likelihood is not a number.
    """
    # Contexts of about one length make full batches.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].requests[0][0]))
    answers: dict[int, Answer] = {}
    with tqdm(total=len(questions), desc=desc, unit="question", disable=not progress) as bar:
        for start in range(0, len(order), BLOCK):
            places = order[start : start + BLOCK]
            answers |= zip(places, _block(scorer, [questions[i] for i in places]))
            bar.update(len(places))
    return [answers[i] for i in range(len(questions))]


def _block(scorer: Scorer, questions: Sequence[Question]) -> list[Answer]:
    scores = iter(scorer.log_likelihoods([request for q in questions for request in q.requests]))
    result = []
    for question in questions:
        own = [next(scores) for _ in question.requests]
        if not all(math.isfinite(score.log_prob) for score in own):
            raise ValueError(
                f"question {question.id}: log-likelihoods {[score.log_prob for score in own]}: the model's "
                "weights or its arithmetic are not finite"
            )
        result.append(Answer(tuple(s.log_prob for s in own), tuple(s.greedy for s in own)))
    return result


def share_of(metric: str, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """`evals.samples.share` of the questions that are right by ``metric``."""
    return share([float(a.right(q, metric)) for q, a in zip(questions, answers)])


def perplexity(answers: Sequence[Answer]) -> dict[str, float | None]:
    """exp of the mean negative log-likelihood per continuation (LAMBADA: per word, whatever its tokens).

    Returns:
        "value", "log" (nats per word), and a 95% interval "low" to "high" by the standard error of the mean
        (None for a single question). Values end at e^700.
    """
    nats = [-answer.log_probs[0] for answer in answers]
    mean = statistics.fmean(nats)
    ends: list[float | None] = [None, None]
    if len(nats) > 1:
        half = _Z * statistics.stdev(nats) / math.sqrt(len(nats))
        ends = [_exp(mean - half), _exp(mean + half)]
    return {"value": _exp(mean), "log": mean, "low": ends[0], "high": ends[1]}


def _exp(nats: float) -> float:
    return math.exp(min(nats, MAX_NATS))


def sample_of(suite: Suite, question: Question, answer: Answer) -> Sample:
    """The question as tables and comparisons read it; right or wrong by the suite's first metric."""
    headline = suite.metrics[0]
    rights = {metric: float(answer.right(question, metric)) for metric in suite.metrics if "acc" in metric}
    place = answer.chosen(question, headline)
    output = question.choices[place]
    if len(question.requests) == 1 and not answer.greedy[0]:
        output = f"another word; this one has probability {math.exp(answer.log_probs[0]):.2g}"
    return Sample(
        id=question.id,
        group=suite.name,
        score=rights[headline],
        prompt=clip(question.prompt),
        answer=clip(question.choices[question.gold]),
        output=clip(output),
        details={
            "choices": [clip(choice) for choice in question.choices],
            "log_likelihoods": list(answer.log_probs),
            **rights,
        },
    )
