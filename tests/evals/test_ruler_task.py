"""RULER's scoring through the tasks themselves: passable, not by luck, by pieces, from one state."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from evals.config import ESSAY_TASKS, EvalConfig, TaskName
from evals.oracle import OracleModel
from evals.ruler.catalogue import RULER
from evals.scorer import _MEASURED, MAX_SPREAD, Scorer
from evals.subject import Subject
from evals.summary import _ruler as summary_of
from evals.tasks import ruler as task
from evals.tasks.registry import get_task
from tests.evals.fakes import ByteTokenizer, RandomModel, RecurrentModel
from tests.evals.ruler_text import encoder, prose

TOKENIZER = ByteTokenizer()
LENGTH = 2560


def subject(model):
    return Subject(
        name="test",
        model=model,
        tokenizer=TOKENIZER,
        digest="d",
        tokenizer_digest="t",
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("essay") / "essay.txt"
    path.write_text(prose())
    return EvalConfig(ruler_lengths=(LENGTH, LENGTH + 256), ruler_samples=3, ruler_essay=str(path))


def make_questions(name, config, *, length=LENGTH, count=3):
    make = RULER[name].questions(task._essay(RULER[name], config))
    encode = encoder(TOKENIZER)
    return [make(seed=config.ruler_seed, length=length, index=i, encode=encode) for i in range(count)]


@pytest.mark.parametrize("name", RULER)
def test_a_model_that_knows_the_answers_scores_exactly_100_through_the_task(name, config):
    questions = [q for n in config.ruler_lengths for q in make_questions(name, config, length=n)]
    known = [(q.ids, TOKENIZER.encode(q.reply)) for q in questions]
    model = OracleModel(known, vocab_size=TOKENIZER.vocab_size, eos_id=TOKENIZER.eos_id)
    result = get_task(name).run(subject(model), config, False)
    assert {group: part["score"] for group, part in result["groups"].items()} == {"2560": 100, "2816": 100}
    assert set(get_task(name).scalars(result).values()) == {100}
    assert set(summary_of(name, result).values()) <= {100, *result["chance"].values()}
    for sample, question in zip(result["samples"], questions):
        assert sample["score"] == 1.0
        assert sample["length"] == int(sample["group"])
        assert sample["depth"] == question.depth
        assert sample["answer"] == ", ".join(question.answers)
        assert sample["output"].strip() == question.reply.strip()


@pytest.mark.parametrize("name", RULER)
def test_a_model_that_knows_nothing_scores_nothing_and_the_oracle_beside_it_everything(
    name, config, monkeypatch
):
    few = replace(config, ruler_lengths=(LENGTH,))
    result = get_task(name).run(subject(RandomModel()), few, False)
    assert result["groups"]["2560"]["score"] < 7  # of cwe's ten words a short one may turn up
    ways = {"generation", "choice"} if name.startswith("niah_single") else {"generation"}
    assert set(result["chance"]) == ways
    assert {way: result["oracle"][way] for way in ways} == dict.fromkeys(ways, 100.0)
    assert result["chance"]["generation"] == 0
    ids = [sample["id"] for sample in result["samples"]]
    assert ids == ["42/2560/0", "42/2560/1", "42/2560/2"]
    depths = [sample["depth"] for sample in result["samples"]]
    assert all(depth is None for depth in depths) if name == "cwe" else all(0 <= d <= 1 for d in depths)


def test_names_of_scalars(config):
    row = {"length": 4096, "generation": {"score": 1.0}, "choice": {"score": 2.0}}
    result = {"rows": [row], "groups": {"4096": {"score": 1.0}}}
    assert get_task("vt").scalars(result) == {"vt/4096": 1.0}
    scalars = get_task("niah_single_1").scalars(result)
    assert scalars == {"niah_single_1/generation/4096": 1.0, "niah_single_1/choice/4096": 2.0}


def chosen(model, count):
    few = EvalConfig(ruler_lengths=(600,))
    questions = make_questions("niah_single_1", few, length=600, count=count)
    outcomes = task.score_questions(Scorer(model, TOKENIZER), questions, answer_tokens=1)
    return sum(outcome.chosen in question.answers for outcome, question in zip(outcomes, questions))


def test_a_choice_by_luck_is_right_one_time_in_ten():
    # 300 draws at 10%: 4.3 standard deviations on either side
    assert 8 <= chosen(RandomModel(), 300) <= 52


def test_ties_of_a_choice_go_by_chance():
    class Constant(RandomModel):
        def prefill(self, tokens, state, **options):
            logits, state = super().prefill(tokens, state, **options)
            return logits * 0, state

    assert 1 <= chosen(Constant(), 100) <= 25


def test_the_score_is_the_share_of_the_answers_in_the_output(config):
    (question,) = make_questions("cwe", config, count=1)
    half = " and ".join(question.answers[:5]).upper()
    assert task._match(question, f"They are {half}.") == 0.5
    assert task._match(question, "") == 0


def test_a_prompt_is_read_once_in_pieces_and_without_logits(config):
    calls = []

    class Recorded(RecurrentModel):
        def prefill(self, tokens, state, *, last_only=False):
            calls.append((tokens.shape[1], last_only))
            return super().prefill(tokens, state, last_only=last_only)

    questions = make_questions("niah_single_2", config, length=LENGTH)
    task.score_questions(Scorer(Recorded(), TOKENIZER, prefill_chunk=128), questions, answer_tokens=2)
    prompt = [tokens for tokens, last_only in calls if last_only]
    others = [tokens for tokens, last_only in calls if not last_only]
    assert max(prompt) <= 128
    shortest = min(len(question.ids) for question in questions)
    # The lengths differ by so little that one batch reads all; measuring a state takes some more.
    assert shortest - 1 <= sum(prompt) <= shortest - 1 + sum(_MEASURED)
    assert max(others) <= MAX_SPREAD + len(" 1234567")


def test_a_written_answer_may_be_as_long_as_the_references(config):
    class Talker(RandomModel):
        """Writes "a" without end."""

        def prefill(self, tokens, state, *, last_only=False):
            logits = torch.zeros(*tokens.shape, self.vocab_size)
            logits[..., ord("a")] = 1.0
            return logits[:, -1] if last_only else logits, state

    for name, tokens in (("niah_multivalue", 128), ("vt", 30), ("cwe", 120)):
        result = get_task(name).run(subject(Talker()), replace(config, ruler_samples=1), False)
        assert {sample["output"] for sample in result["samples"]} == {"a" * tokens}


def test_what_a_result_depends_on_is_in_its_settings(config, tmp_path):
    settings = get_task("vt").settings
    assert settings(config) == {"lengths": [2560, 2816], "samples": 3, "essay": "", "seed": 42}
    needle = get_task("niah_single_3").settings
    (tmp_path / "other.txt").write_text("Another text.")
    assert needle(config) != needle(replace(config, ruler_essay=str(tmp_path / "other.txt")))
    assert needle(config) != needle(replace(config, ruler_seed=7))


@pytest.mark.parametrize("name", ESSAY_TASKS)
def test_an_essay_task_without_its_text_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f'evals.tasks names "{name}": set evals.ruler_essay'):
        EvalConfig(tasks=(name,))
    with pytest.raises(ValueError, match=f"{name} hides needles in prose: set evals.ruler_essay"):
        get_task(name).settings(EvalConfig())
    (tmp_path / "essay.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no words"):
        get_task(name).settings(EvalConfig(ruler_essay=str(tmp_path / "essay.txt")))


def test_the_tasks_that_need_prose_are_the_ones_the_configuration_knows():
    assert {name for name, entry in RULER.items() if entry.essay} == set(ESSAY_TASKS)
    assert set(RULER) <= set(get_args(TaskName))


@pytest.mark.parametrize(
    "wrong",
    [
        {"ruler_samples": 0},
        {"ruler_lengths": (255,)},
        {"ruler_lengths": ()},
        {"ruler_lengths": (4096, 1023), "tasks": ("vt",)},
        {"ruler_lengths": (1023,), "tasks": ("cwe",)},
        {"ruler_lengths": (511,), "tasks": ("niah_multiquery",), "ruler_essay": "x"},
        {"mqar_pairs": ()},
        {"mqar_pairs": (0,)},
        {"mqar_length": (254,)},
        {"mqar_length": (256, 301)},
        {"mqar_length": ()},
        {"mqar_samples": 0},
        {"mqar_seed": -1},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"evals.{next(iter(wrong))}"):
        EvalConfig(**wrong)
