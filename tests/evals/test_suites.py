"""The seven suites without the harness: schemas, files, metrics, samples, the task of each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.tokenizer import Tokenizer
from evals.config import EvalConfig
from evals.scorer import Score, Scorer
from evals.suites import scoring
from evals.suites.catalogue import SUITES
from evals.suites.question import Answer, Question, ask
from evals.suites.rows import find_file, read_questions
from evals.suites.scoring import answer_questions, perplexity, sample_of
from evals.tasks.registry import TASKS
from tests.evals.conftest import VOCAB
from tests.evals.fakes import ByteTokenizer, RecurrentModel
from tests.evals.suite_rows import (
    ARC_FIVE,
    ARC_FLAT,
    ARC_HUB,
    ARC_NESTED,
    ARC_NUMBERED,
    HELLASWAG,
    HELLASWAG_CLEAN,
    HELLASWAG_MARKED,
    REAL,
    ROWS,
    fake_subject,
    write_rows,
)
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

HEADLINES = {  # table 1 of the paper
    "lambada": ("acc", "perplexity"),
    "piqa": ("acc",),
    "hellaswag": ("acc_norm",),
    "winogrande": ("acc",),
    "arc_easy": ("acc",),
    "arc_challenge": ("acc_norm",),
    "siqa": ("acc",),
}
PIQA = {"goal": "Boil it", "sol1": "with fire", "sol2": "with ice", "label": 0}
WINOGRANDE = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
SIQA = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real rows where they are at hand."""
    return REAL if REAL.is_dir() else write_rows(tmp_path_factory.mktemp("rows") / "suites")


def test_all_suites_run_with_a_real_model(folder, dataset_dir):
    tokenizer = Tokenizer.load(dataset_dir / "tokenizer.model")
    trellis = TrellisConfig(slots=8, chunk_size=16, gates=["learned"])
    config = ModelConfig(
        vocab_size=VOCAB, num_layers=1, dim=16, num_heads=2, pattern=["trellis"], trellis=trellis
    )
    trained = fake_subject(build_language_model(config, seed=0).eval(), tokenizer)
    for name, headline in HEADLINES.items():
        task = TASKS[name]
        settings = EvalConfig(tasks=(name,), suites_folder=str(folder), suites_limit=5, device="cpu")
        result = task.run(trained, settings, False)
        count = len(result["samples"])
        assert 1 <= count == result["questions"] == result["groups"][name]["samples"] <= 5
        scores = [sample["score"] for sample in result["samples"]]
        assert result["groups"][name]["score"] == pytest.approx(100 * sum(scores) / count)
        assert {sample["group"] for sample in result["samples"]} == {name}
        scalars = task.scalars(result)
        assert next(iter(scalars)) == f"{name}/{headline[0]}"
        assert {f"{name}/{metric}" for metric in headline} <= set(scalars)
        assert scalars[f"{name}/{headline[0]}"] == result["groups"][name]["score"]
        json.dumps(result, allow_nan=False)
        again = task.run(trained, settings, False)
        assert [sample["id"] for sample in again["samples"]] == [sample["id"] for sample in result["samples"]]


def test_parts_are_tokenised_as_the_harness_tokenises_the_whole(folder, dataset_dir):
    """lm_eval's own models encode context and continuation together, and cut: the same for these rows."""
    encode = Tokenizer.load(dataset_dir / "tokenizer.model").encode

    def same(context: str, continuation: str) -> bool:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        return encode(kept + continuation) == encode(kept) + encode(continuation)

    every = [
        request for suite in SUITES.values() for q in read_questions(folder, suite) for request in q.requests
    ]
    assert all(same(*request) for request in every)
    text = "    return self.parser"  # what would show: continuations that go on within a word
    assert not all(same(text[:cut], text[cut:]) for cut in range(5, len(text)))


@pytest.mark.parametrize("name", ("piqa", "lambada"))
def test_a_suite_takes_the_first_questions_and_their_ids_stay(folder, name):
    suite = SUITES[name]
    every = read_questions(folder, suite)
    assert read_questions(folder, suite, limit=2) == every[:2]
    assert len({question.id for question in every}) == len(every)


@pytest.mark.parametrize(
    "name, row, contexts, continuations, gold",
    [
        ("lambada", {"text": "a b\n c"}, ["a b\n"], [" c"], 0),
        ("lambada", {"text": "alone"}, [""], [" alone"], 0),
        ("piqa", PIQA, ["Question: Boil it\nAnswer:"] * 2, [" with fire", " with ice"], 0),
        ("piqa", PIQA | {"label": "1"}, ["Question: Boil it\nAnswer:"] * 2, [" with fire", " with ice"], 1),
        (
            "hellaswag",
            HELLASWAG,
            ["Roof shingle removal: A man is sitting on a roof. He"] * 4,
            [f" {ending}" for ending in HELLASWAG["endings"]],
            3,
        ),
        ("winogrande", WINOGRANDE, ["a x", "a y"], [" b", " b"], 0),
        ("arc_easy", ARC_NUMBERED, None, [f" {text}" for text in ARC_NUMBERED["choices"]["text"]], 3),
        ("arc_challenge", ARC_FIVE, ["Question: How many?\nAnswer:"] * 5, [" 1", " 2", " 3", " 4", " 5"], 4),
        ("siqa", SIQA, ["Q: c q\nA:"] * 3, [" a", " b", " c"], 1),
    ],
)
def test_prompts_written_out(name, row, contexts, continuations, gold):
    question = SUITES[name].read(row)
    assert [after for _, after in question.requests] == continuations
    assert contexts is None or [before for before, _ in question.requests] == contexts
    assert question.gold == gold
    if name != "winogrande":  # whose choices stand in the context
        assert question.lengths == tuple(len(text) - 1 for text in continuations)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("arc_easy", (ARC_NESTED, ARC_HUB, ARC_FLAT)),
        ("hellaswag", (HELLASWAG_MARKED, HELLASWAG_CLEAN)),
        ("hellaswag", (HELLASWAG, HELLASWAG | {"label": 3})),
        ("siqa", (SIQA, SIQA | {"label": 2})),
    ],
)
def test_forms_of_one_row_are_one_question(name, rows):
    assert len({SUITES[name].read(row) for row in rows}) == 1


def write_as(form: str, path: Path, rows: list) -> None:
    if form == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("form", ("jsonl", "json", "parquet"))
def test_files_of_every_form(tmp_path, form):
    rows = [ARC_NUMBERED, ARC_FIVE, ARC_NUMBERED]
    write_as(form, tmp_path / f"arc_easy.{form}", rows)
    questions = read_questions(tmp_path, SUITES["arc_easy"])
    assert [question.choices for question in questions] == [tuple(row["choices"]["text"]) for row in rows]
    # A row that is there twice is two questions, and the first keeps its id.
    first, _, again = questions
    assert again.id == f"{first.id}-2"
    assert replace(again, id=first.id) == first


BAD_ROWS = [
    ("lambada", {"txt": "a"}, "text is missing; a row of lambada has text"),
    ("lambada", {"text": "  "}, "text is empty"),
    ("piqa", {**PIQA, "label": -1}, r"label = -1; .* goal, sol1, sol2 and label \(0 or 1\)"),
    ("piqa", {**PIQA, "label": True}, "label = True"),
    ("piqa", {**PIQA, "sol2": 3}, "sol2 = 3 is no text"),
    ("piqa", [1], "not an object"),
    ("hellaswag", {**HELLASWAG, "endings": ["a", "b", "c"]}, "3 endings"),
    ("hellaswag", {**HELLASWAG, "endings": "abcd"}, "endings is no list of texts"),
    ("hellaswag", {**HELLASWAG, "label": ""}, "label = ''"),
    ("hellaswag", {k: v for k, v in HELLASWAG.items() if k != "ctx_b"}, "ctx_b is missing"),
    ("winogrande", {**WINOGRANDE, "sentence": "no gap"}, "no gap"),
    ("winogrande", {**WINOGRANDE, "answer": ""}, r"answer = ''; .*answer \(1 or 2\)"),
    ("winogrande", {**WINOGRANDE, "answer": 0}, "answer = 0"),
    ("arc_easy", {**ARC_HUB, "answerKey": "D"}, "answerKey = 'D' is none of A, B, C"),
    ("arc_easy", {**ARC_FLAT, "gold": 3}, "gold = 3"),
    ("arc_easy", {**ARC_FLAT, "choices": ["a", "b"], "gold": 0}, "2 choices"),
    ("arc_easy", {**ARC_HUB, "choices": {"text": ["a", "b", "c"], "label": ["A"]}}, "3 choices with 1 label"),
    ("arc_challenge", {**ARC_NESTED, "question": {"stem": "s"}}, "choices is missing"),
    ("siqa", {**SIQA, "label": "4"}, r"label = '4'; .*label \(1 to 3\)"),
]


@pytest.mark.parametrize("name, row, message", BAD_ROWS)
def test_a_row_that_fits_no_schema_is_refused_in_one_line(tmp_path, name, row, message):
    path = tmp_path / f"{SUITES[name].files[0]}.jsonl"
    good = next(line for file, rows in ROWS.items() if file in SUITES[name].files for line in rows)
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 2: .*{message}") as refused:
        read_questions(tmp_path, SUITES[name])
    assert "\n" not in str(refused.value)
    assert len(read_questions(tmp_path, SUITES[name], limit=1)) == 1


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("piqa.jsonl", b"{\n", r"piqa\.jsonl, line 1 is not JSON"),
        ("piqa.jsonl", b'{"goal": "\xff"}\n', r"piqa\.jsonl, line 1 is not JSON"),
        ("piqa.jsonl", b"\n", r"piqa\.jsonl has no rows"),
        ("piqa.json", b'{"a": 1}', r"piqa\.json is no list"),
        ("piqa.json", b"[", r"piqa\.json is not valid JSON"),
        ("piqa.parquet", b"PAR1", r"piqa\.parquet is not a parquet file"),
        ("other.jsonl", b"{}", r"has no file for piqa: give it piqa\.jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, file, text, message):
    (tmp_path / file).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path, SUITES["piqa"])


def test_of_two_files_for_a_suite_none_is_chosen(tmp_path):
    for name in ("siqa.jsonl", "social_iqa.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=r"has social_iqa\.json and siqa\.jsonl for siqa: keep one"):
        find_file(tmp_path, SUITES["siqa"])


def test_settings_follow_the_rows_and_the_limit(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps(PIQA))

    def settings(**changes) -> str:
        config = EvalConfig(tasks=("piqa",), **({"suites_folder": str(tmp_path)} | changes))
        return json.dumps(TASKS["piqa"].settings(config), sort_keys=True)

    first = settings()
    assert settings() == first
    assert settings(suites_limit=1) != first
    assert SUITES["piqa"].hub.revision in settings(suites_folder=None)
    path.write_text(json.dumps(PIQA | {"label": 1}))
    assert settings() != first
    with pytest.raises(ValueError, match=r"evals\.suites_folder = /nowhere has no file for piqa"):
        settings(suites_folder="/nowhere")
    with pytest.raises(ValueError, match=r"evals\.suites_limit = -1: use 0 \(all\) or more"):
        settings(suites_limit=-1)


def test_without_a_folder_rows_come_from_a_pinned_commit(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return ROWS[SUITES[current].files[0]][:1]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for current in SUITES:
        assert len(read_questions(None, SUITES[current])) == 1
    assert [(name, subset, split) for name, subset, split, _ in asked] == [
        ("EleutherAI/lambada_openai", "default", "test"),
        ("baber/piqa", None, "validation"),
        ("Rowan/hellaswag", None, "validation"),
        ("allenai/winogrande", "winogrande_xl", "validation"),
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("lighteval/siqa", None, "validation"),
    ]
    assert all(len(revision) == 40 and set(revision) <= set("0123456789abcdef") for *_, revision in asked)


def test_without_a_network_the_remedy_is_named():
    # The tests run with HF_HUB_OFFLINE=1.
    message = (
        r"baber/piqa@142f6d7 cannot be loaded \(.+\): set evals\.suites_folder to a folder with piqa\.jsonl"
    )
    with pytest.raises(ValueError, match=message) as refused:
        read_questions(None, SUITES["piqa"])
    assert "\n" not in str(refused.value)


CHOICES = ask([("c", " ab"), ("c", " abcd"), ("c", " ")], 1, choices=["ab", "abcd", ""])


@pytest.mark.parametrize(
    "log_probs, acc, acc_norm",
    [
        ((-3.0, -5.0, -9.0), 0, 1),  # -1.5, -1.25 a character
        ((-2.0, -4.0, -9.0), 0, 0),  # equal: the first
        ((-9.0, -2.0, -2.0), 1, 1),
        ((-9.0, -8.0, -1.0), 2, 1),  # no characters: never by acc_norm
    ],
)
def test_choices_by_likelihood_and_per_character(log_probs, acc, acc_norm):
    answer = Answer(log_probs, (False,) * 3)
    assert (answer.chosen(CHOICES, "acc"), answer.chosen(CHOICES, "acc_norm")) == (acc, acc_norm)
    assert answer.right(CHOICES, "acc") == (acc == 1)
    assert answer.right(CHOICES, "acc_norm") == (acc_norm == 1)


def test_perplexity_is_per_word_with_an_interval():
    answers = [Answer((-1.0,), (True,)), Answer((-3.0,), (False,))]
    found = perplexity(answers)
    assert found["value"] == pytest.approx(math.exp(2))
    # The standard error of 1 and 3 is 1.
    assert (found["low"], found["high"]) == pytest.approx((math.exp(2 - 1.96), math.exp(2 + 1.96)))
    alone = perplexity(answers[:1])
    assert (alone["log"], alone["low"], alone["high"]) == (1.0, None, None)
    assert math.isfinite(perplexity([Answer((-9999.0,), (False,))])["value"])


@pytest.mark.parametrize(
    "greedy, score, output", [(True, 1.0, "mat"), (False, 0.0, r"another word; .* 0\.37")]
)
def test_a_last_word_is_right_when_it_is_what_the_model_would_write(greedy, score, output):
    question = SUITES["lambada"].read({"text": "the cat on the mat"})
    sample = sample_of(SUITES["lambada"], question, Answer((-1.0,), (greedy,)))
    assert (sample.score, sample.answer, sample.prompt) == (score, "mat", "the cat on the")
    assert re.fullmatch(output, sample.output)


def test_a_sample_says_what_was_chosen_by_the_metric_of_table_1():
    row = HELLASWAG_CLEAN | {"choices": ["a", "bb", "a much longer ending", "d"], "label": 2}
    answer = Answer((-2.0, -2.0, -3.0, -2.0), (False,) * 4)
    sample = sample_of(SUITES["hellaswag"], SUITES["hellaswag"].read(row), answer)
    assert (sample.score, sample.output, sample.answer) == (
        1.0,
        "a much longer ending",
        "a much longer ending",
    )
    assert sample.details["acc"] == 0.0
    assert sample.details["acc_norm"] == 1.0
    assert sample.details["log_likelihoods"] == [-2.0, -2.0, -3.0, -2.0]
    gap = sample_of(
        SUITES["winogrande"], SUITES["winogrande"].read(WINOGRANDE), Answer((-2, -1), (False,) * 2)
    )
    assert (gap.prompt, gap.answer, gap.output, gap.score) == ("a _ b", "a x", "a y", 0.0)


class Recorder(Scorer):
    """Remembers how much was asked for at once."""

    calls: list[int]

    def log_likelihoods(self, requests):
        self.calls.append(len(requests))
        return super().log_likelihoods(requests)


def test_blocks_bound_memory_and_change_nothing(folder, monkeypatch):
    questions = read_questions(folder, SUITES["arc_easy"], limit=7)
    scorer = Recorder(RecurrentModel(), ByteTokenizer())
    scorer.calls = []
    whole = answer_questions(scorer, questions)
    monkeypatch.setattr(scoring, "BLOCK", 2)
    parts = answer_questions(scorer, questions)
    most = max(len(question.requests) for question in questions)
    assert len(scorer.calls) == 1 + math.ceil(len(questions) / 2)
    assert max(scorer.calls[1:]) <= 2 * most
    for one, other in zip(whole, parts, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, rel=1e-12)
    # In the order of the questions, whatever the blocks.
    direct = [score.log_prob for score in scorer.log_likelihoods(list(questions[-1].requests))]
    assert list(parts[-1].log_probs) == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("value", (math.nan, -math.inf))
def test_log_likelihoods_that_are_not_finite_are_refused(value):
    class Broken(Scorer):
        def log_likelihoods(self, requests):
            return [Score(value, False, 1) for _ in requests]

    question = SUITES["siqa"].read(SIQA)
    with pytest.raises(ValueError, match=rf"question {question.id}: .* are not finite"):
        answer_questions(Broken(RecurrentModel(), ByteTokenizer()), [question])


def shifted(question: Question) -> Question:
    """One more space before every continuation."""
    return ask([(a, f" {b}") for a, b in question.requests], question.gold, choices=question.choices)


@pytest.mark.parametrize("change", (shifted, lambda q: ask(q.requests, 1 - q.gold, choices=q.choices)))
def test_an_id_is_of_what_is_asked(change: Callable[[Question], Question]):
    question = SUITES["piqa"].read(PIQA)
    assert change(question).id != question.id
    assert ask(question.requests, question.gold, choices=question.choices).id == question.id
