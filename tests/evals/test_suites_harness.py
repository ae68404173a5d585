"""The suites equal lm-evaluation-harness's definitions: prompts, gold, metrics and every sample's numbers.

The harness runs its installed task files on the same rows: real ones where they are at hand, and rows written
here in every original schema.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from evals.config import EvalConfig
from evals.harness import run_harness
from evals.scorer import Scorer
from evals.suites.catalogue import SUITES, Suite
from evals.suites.harness_tasks import harness_row, write_harness_tasks
from evals.suites.question import Answer, Question
from evals.suites.rows import read_questions
from evals.suites.schemas import SchemaError, hellaswag
from evals.suites.scoring import answer_questions, perplexity, share_of
from evals.tasks.registry import TASKS
from tests.evals.fakes import ByteTokenizer, RecurrentModel
from tests.evals.suite_rows import HELLASWAG_CLEAN, HELLASWAG_MARKED, REAL, fake_subject, write_rows

# The harness's, for a choice without characters.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

NAMES = {"lambada": "lambada_openai", "siqa": "social_iqa"}  # the harness's, where they are others
# Questions per suite that a model scores, and whose metrics are compared; prompts are compared on all.
SCORED, MEASURED = 6, 100


@dataclass
class Rows:
    """The rows of one folder and what lm_eval makes of them."""

    suites: Path
    tasks: Path
    loaded: dict[str, Any]

    def theirs(self, suite: Suite) -> Any:
        return self.loaded[NAMES.get(suite.name, suite.name)]

    def ours(self, suite: Suite) -> list[Question]:
        return read_questions(self.suites, suite)


def load(suites: Path, folder: Path) -> Rows:
    from lm_eval.tasks import TaskManager

    names = write_harness_tasks(suites, folder / "tasks", cache=folder / "cache")
    assert names == [NAMES.get(name, name) for name in SUITES]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    loaded = manager.load(names)["tasks"]
    for task in loaded.values():
        task.build_all_requests()
    return Rows(suites, folder / "tasks", loaded)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Iterator[list[Rows]]:
    root = tmp_path_factory.mktemp("stock")
    own = write_rows(root / "own-rows")
    from lm_eval import utils

    with pytest.MonkeyPatch.context() as patch:  # it compiles a template anew for every row: 6 ms each
        patch.setattr(utils.env, "from_string", functools.cache(utils.env.from_string))
        yield [load(own, root / "own"), *([load(REAL, root / "real")] if REAL.is_dir() else [])]


def wrong_prompts(questions: list[Question], task: Any) -> list[int]:
    """Questions whose requests are not the harness's."""
    theirs: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        theirs.setdefault(instance.doc_id, []).append(tuple(instance.args))
    assert len(theirs) == len(questions)
    return [place for place, q in enumerate(questions) if list(q.requests) != theirs[place]]


def draws(question: Question) -> list[Answer]:
    """Answers by which every choice is preferred once, by its sum and by half a character's worth."""
    if len(question.requests) == 1:
        return [Answer((-3.0,), (greedy,)) for greedy in (True, False)]
    lengths, places = [max(n, 1) for n in question.lengths], range(len(question.choices))
    sums = [tuple(-1.0 - (place != best) for place in places) for best in places]
    for best, next_best in itertools.permutations(places, 2):
        log_probs = [-10.0 * n for n in lengths]
        log_probs[best], log_probs[next_best] = -lengths[best], -lengths[next_best] - 0.5
        sums.append(tuple(log_probs))
    return [Answer(log_probs, (False,) * len(places)) for log_probs in sums]


Measured = list[tuple[Answer, dict[str, Any]]]


def measure(suite: Suite, questions: list[Question], task: Any) -> list[Measured]:
    """Per question some answers and what the harness says of each."""
    result = []
    for question, doc in zip(questions, task.eval_docs):
        answers = draws(question)
        metrics = [task.process_results(doc, list(zip(a.log_probs, a.greedy))) for a in answers]
        assert all(set(found) == set(suite.metrics) for found in metrics)
        result.append(list(zip(answers, metrics)))
    return result


def wrong_metrics(suite: Suite, questions: list[Question], measured: list[Measured]) -> list[int]:
    """Questions that get another metric than the harness gives for some answer."""
    names = [name for name in suite.metrics if name != "perplexity"]
    return [
        place
        for place, (question, pairs) in enumerate(zip(questions, measured, strict=True))
        if any(a.right(question, name) != found[name] for a, found in pairs for name in names)
    ]


def spaced(question: Question, where: str) -> Question:
    """The question with one space too many."""
    (before, after), *rest = question.requests
    changed = {"context": (f"{before} ", after), "continuation": (before, f" {after}")}.get(where)
    if changed:
        return replace(question, requests=(changed, *rest))
    place = (question.gold + 1) % len(question.choices)
    choices = [text + " " * (number == place) for number, text in enumerate(question.choices)]
    return replace(question, choices=tuple(choices))


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_prompts_are_the_harness_s_and_a_space_too_many_shows(folders, suite):
    for rows in folders:
        questions, task = rows.ours(suite), rows.theirs(suite)
        assert wrong_prompts(questions, task) == []
        for where in ("context", "continuation"):
            altered = [*questions[:-1], spaced(questions[-1], where)]
            assert wrong_prompts(altered, task) == [len(questions) - 1]


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_gold_and_metrics_are_the_harness_s_and_other_ones_show(folders, suite):
    for rows in folders:
        questions = rows.ours(suite)[:MEASURED]
        measured = measure(suite, questions, rows.theirs(suite))
        assert wrong_metrics(suite, questions, measured) == []
        every = list(range(len(questions)))
        if len(questions[0].choices) > 1:
            moved = [replace(q, gold=(q.gold + 1) % len(q.choices)) for q in questions]
            assert wrong_metrics(suite, moved, measured) == every
        if "acc_norm" in suite.metrics:
            longer = [spaced(question, "choice") for question in questions]
            assert wrong_metrics(suite, longer, measured) == every


def differences(suite: Suite, questions: list[Question], outcome: dict[str, Any]) -> list[int]:
    """Questions of which some choice's log-likelihood or its greediness is not that of the harness's path."""
    scorer = Scorer(RecurrentModel(), ByteTokenizer())
    answers = answer_questions(scorer, questions)
    logged = sorted(outcome["samples"][NAMES.get(suite.name, suite.name)], key=lambda one: one["doc_id"])
    wrong = []
    for place, (answer, sample) in enumerate(zip(answers, logged, strict=True)):
        theirs = [(float(value), bool(greedy)) for value, greedy in sample["filtered_resps"]]
        same = [value for value, _ in theirs] == pytest.approx(list(answer.log_probs), rel=1e-9)
        if not same or [greedy for _, greedy in theirs] != list(answer.greedy):
            wrong.append(place)
    return wrong


@pytest.fixture(scope="module")
def outcomes(folders) -> list[dict[str, Any]]:
    """The harness's path of every suite on the first rows, through the adapter."""
    scorer = Scorer(RecurrentModel(), ByteTokenizer())
    names = [NAMES.get(name, name) for name in SUITES]
    return [run_harness(scorer, names, include_path=rows.tasks, limit=SCORED) for rows in folders]


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_sample_has_the_same_numbers_by_both_paths(folders, outcomes, suite):
    for rows, outcome in zip(folders, outcomes, strict=True):
        questions = rows.ours(suite)[:SCORED]
        assert differences(suite, questions, outcome) == []
        for where in ("context", "continuation"):
            altered = [spaced(questions[0], where), *questions[1:]]
            assert differences(suite, altered, outcome) == [0]
        answers = answer_questions(Scorer(RecurrentModel(), ByteTokenizer()), questions)
        results = outcome["results"][NAMES.get(suite.name, suite.name)]
        assert results["sample_len"] == len(questions)
        for metric in suite.metrics:
            if metric == "perplexity":
                assert results["perplexity,none"] == pytest.approx(perplexity(answers)["value"], rel=1e-9)
            else:
                share = share_of(metric, questions, answers)["score"]
                assert results[f"{metric},none"] == pytest.approx(share / 100)


def test_tasks_of_both_paths_give_the_same_scalars_and_samples(folders):
    rows = folders[-1]
    native = EvalConfig(suites_folder=str(rows.suites), suites_limit=SCORED)
    stock = EvalConfig(
        harness_folder=str(rows.tasks), harness_tasks=("arc_easy", "winogrande"), harness_limit=SCORED
    )
    theirs = TASKS["harness"].run(fake_subject(), stock, False)
    for name in stock.harness_tasks:
        ours = TASKS[name].run(fake_subject(), native, False)
        for scalar, value in TASKS[name].scalars(ours).items():
            assert TASKS["harness"].scalars(theirs)[f"harness/{scalar}"] == pytest.approx(value)
        assert theirs["groups"][name] == ours["groups"][name]
        own = [sample for sample in theirs["samples"] if sample["group"] == name]
        for one, other in zip(ours["samples"], own, strict=True):
            assert (one["score"], one["output"].strip()) == (other["score"], other["output"].strip())
        assert len({sample["id"] for sample in own}) == len(own)
    json.dumps(theirs, allow_nan=False)


def test_preprocessed_rows_have_an_exact_original():
    suite = SUITES["hellaswag"]
    for row in (HELLASWAG_CLEAN, HELLASWAG_MARKED):
        original = harness_row(suite, row)
        assert "query" not in original
        assert hellaswag(original) == hellaswag(row)
    spaces = HELLASWAG_CLEAN | {"choices": ["  a   b ", " ", "", "c"]}
    assert hellaswag(harness_row(suite, spaces)).choices == ("  a   b ", " ", "", "c")
    for change in ({"query": "no colon"}, {"choices": ["a [b] c", "b", "c", "d"]}):
        with pytest.raises(SchemaError, match="no original row gives these texts"):
            harness_row(suite, HELLASWAG_CLEAN | change)


def test_the_folder_names_what_the_harness_cannot_have(tmp_path, monkeypatch):
    bad = tmp_path / "hellaswag.jsonl"
    bad.write_text(f"{json.dumps(HELLASWAG_CLEAN)}\n{json.dumps(HELLASWAG_CLEAN | {'query': 'none'})}\n")
    with pytest.raises(ValueError, match=rf"^{bad}, line 2: no original row"):
        write_harness_tasks(tmp_path, tmp_path / "tasks", suites=["hellaswag"])
    with pytest.raises(ValueError, match=r"has no file for piqa: give it piqa\.jsonl"):
        write_harness_tasks(tmp_path, tmp_path / "tasks", suites=["piqa"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed: pip install 'trellis-dist\[evals\]'"):
        write_harness_tasks(tmp_path, tmp_path / "tasks")
