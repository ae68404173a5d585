"""LAMBADA, PIQA, HellaSwag, WinoGrande, ARC and SIQA: one task per suite, all made by one function.

Their prompts and metrics are lm-evaluation-harness's; its own path (`evals.tasks.harness`, on a folder that
`evals.suites.harness_tasks` writes) gives the same numbers per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from evals.config import EvalConfig
from evals.samples import chance_of
from evals.scorer import Scorer
from evals.suites.catalogue import DEFINITION, SUITES, Suite
from evals.suites.rows import find_file, read_questions
from evals.suites.scoring import answer_questions, perplexity, sample_of, share_of
from evals.tasks.protocol import Result, Task
from trellis_dist.files import sha256_file

if TYPE_CHECKING:
    from evals.subject import Subject

__all__ = ["TASKS", "suite_task"]


def suite_task(suite: Suite) -> Task:
    """The task that scores a suite."""
    return Task(
        name=suite.name,
        settings=partial(_settings, suite),
        run=partial(_run, suite),
        scalars=partial(_scalars, suite),
        chance=partial(_chance, suite),
    )


def _settings(suite: Suite, config: EvalConfig) -> Mapping[str, Any]:
    """The rows count by their file's content, or by the commit of their data set."""
    if config.suites_folder:
        data: dict[str, Any] = {"sha256": sha256_file(find_file(config.suites_folder, suite))}
    else:
        data = asdict(suite.hub)
    return {"data": data, "limit": config.suites_limit, "definition": DEFINITION}


def _run(suite: Suite, subject: Subject, config: EvalConfig, progress: bool) -> Result:
    questions = read_questions(config.suites_folder, suite, limit=config.suites_limit)
    scorer = Scorer(subject.model, subject.tokenizer)
    answers = answer_questions(scorer, questions, progress=progress, desc=suite.name)
    shares = {m: share_of(m, questions, answers) for m in suite.metrics if m != "perplexity"}
    return {
        "groups": {suite.name: shares[suite.metrics[0]]},
        "metrics": shares,
        **({"perplexity": perplexity(answers)} if "perplexity" in suite.metrics else {}),
        "questions": len(questions),
        "definition": DEFINITION,
        "samples": [sample_of(suite, q, a).to_json() for q, a in zip(questions, answers)],
    }


def _scalars(suite: Suite, result: Result) -> dict[str, float]:
    """Accuracies in percent, table 1's first; LAMBADA's perplexity is that of a word."""
    scalars = {f"{suite.name}/{metric}": part["score"] for metric, part in result["metrics"].items()}
    if "perplexity" in result:
        scalars[f"{suite.name}/perplexity"] = result["perplexity"]["value"]
    return scalars


def _chance(suite: Suite, result: Result) -> dict[str, float]:
    """Of the accuracies: one of each question's choices, none where a word of any vocabulary is asked for."""
    share = 100 * chance_of(result["samples"])
    return {f"{suite.name}/{metric}": share for metric in result["metrics"]}


TASKS = tuple(suite_task(suite) for suite in SUITES.values())
