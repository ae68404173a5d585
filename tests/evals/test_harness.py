"""lm-evaluation-harness through our scorer: the same numbers per sample, offline."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from evals.config import EvalConfig
from evals.evaluate import evaluate_run
from evals.harness import MAX_NEW_TOKENS, _sampling, harness_model, run_harness
from evals.report import write_run_report
from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.summary import write_summary
from evals.tasks.registry import get_task
from tests.evals.fakes import BYTES, ByteTokenizer, RecurrentModel
from tests.evals.suite_rows import fake_subject

ROWS = [
    {"question": "Ice is", "choices": ["cold", "hot", "loud"], "answer": 0},
    {"question": "A bird can", "choices": ["read", "fly", "melt", "rust"], "answer": 1},
    {"question": "Water boils when it is", "choices": ["hot enough", "asleep"], "answer": 0},
]
CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
# Two filters of one answer, of which the second never matches.
WRITE_TASK = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: "{target}"
generation_kwargs: {{max_gen_toks: 12, until: ["\\n\\n"]}}
filter_list:
  - {{name: as-written, filter: [{{function: take_first}}]}}
  - {{name: digits, filter: [{{function: regex, regex_pattern: "[0-9]{{{{9}}}}"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks = root / "tasks"
    tasks.mkdir()
    text = CHOICE_TASK.format(data=root / "rows.jsonl", cache=root / "cache")
    (tasks / "tiny_choice.yaml").write_text(text)
    return tasks


def test_harness_and_native_scorer_give_the_same_numbers_per_sample(folder):
    scorer = Scorer(RecurrentModel(), ByteTokenizer())
    outcome = run_harness(scorer, ["tiny_choice"], include_path=folder)
    samples = sorted(outcome["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    right = []
    for row, sample in zip(ROWS, samples, strict=True):
        native = scorer.log_likelihoods([(row["question"], f" {choice}") for choice in row["choices"]])
        shown = [float(response[0]) for response in sample["filtered_resps"]]
        assert shown == pytest.approx([score.log_prob for score in native], abs=1e-9)
        right.append(max(range(len(native)), key=lambda c: native[c].log_prob) == row["answer"])
    assert outcome["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_an_unknown_harness_task_is_refused(folder):
    with pytest.raises(ValueError, match=r"no harness task 'other': it has tiny_choice"):
        run_harness(Scorer(RecurrentModel(), ByteTokenizer()), ["other"], include_path=folder)


def test_rolling_and_generation_through_the_adapter():
    from lm_eval.api.instance import Instance

    scorer = Scorer(RecurrentModel(), ByteTokenizer())
    model = harness_model(scorer)

    def request(kind, *args):
        return Instance(request_type=kind, doc={}, arguments=args, idx=0)

    text = "some text"
    assert model.loglikelihood_rolling([request("loglikelihood_rolling", text)]) == [
        scorer.rolling([text])[0].log_prob
    ]
    options = {"until": ["\n\n"], "max_gen_toks": 5}
    for prompt in (text, f"{text}\n "):  # written on from the whole prompt, its last spaces included
        ids = [scorer.tokenizer.bos_id, *scorer.tokenizer.encode(prompt)]
        expected = scorer.generate([ids], Sampling(max_tokens=5, stop=("\n\n",)))
        assert model.generate_until([request("generate_until", prompt, options)]) == expected


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_every_name_of_the_length_counts(name):
    assert _sampling({name: 7}) == Sampling(max_tokens=7)
    assert _sampling({}).max_tokens == MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0.5, "do_sample": True}, 0.5),
        ({"temperature": 0.5, "do_sample": False}, 0.0),
        ({"temperature": 0.0}, 0.0),
        ({"until": "x"}, 0.0),
    ],
)
def test_a_temperature_samples_unless_sampling_is_refused(options, temperature):
    stop = tuple(options.get("until", ""))
    assert _sampling(options) == Sampling(max_tokens=MAX_NEW_TOKENS, temperature=temperature, stop=stop)


def test_what_python_compiles_in_the_folder_changes_no_key(folder):
    config = EvalConfig(harness_folder=str(folder), harness_tasks=("tiny_choice",))
    before = get_task("harness").settings(config)
    assert before["harness_version"] == version("lm_eval")
    compiled = folder / "__pycache__" / "choices.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"x")
    assert get_task("harness").settings(config) == before
    (folder / "choices.py").write_text("x = 1")
    try:
        assert get_task("harness").settings(config) != before
    finally:
        (folder / "choices.py").unlink()


def test_our_rooms_are_imported_beside_published_packages_of_the_same_names():
    root = Path(__file__).parents[2]
    # transformers looks for a package named `kernels`; lm_eval imports `evaluate`.
    for name in ("transformers.modeling_utils", "lm_eval", "lm_eval.evaluator", "datasets"):
        importlib.import_module(name)
    for room in ("kernels", "evals", "evals.config", "data_pipeline", "checkpoints", "launch"):
        module = importlib.import_module(room)
        assert module.__file__ is not None
        assert Path(module.__file__).is_relative_to(root), f"{room} is {module.__file__}"


def test_harness_tasks_run_as_a_task_of_a_run(folder, run_dir):
    config = EvalConfig(
        tasks=("harness",),
        harness_folder=str(folder),
        harness_tasks=("tiny_choice",),
        harness_limit=2,
        device="cpu",
    )
    record = evaluate_run(run_dir, config, progress=False)["harness"]
    assert set(record["result"]["results"]["tiny_choice"]) == {"acc", "acc_norm"}
    assert record["result"]["questions"] == {"tiny_choice": 2}
    group = record["result"]["groups"]["tiny_choice"]
    assert group["samples"] == 2
    scalars = get_task("harness").scalars(record["result"])
    assert scalars["harness/tiny_choice/acc"] == group["score"]
    summary = write_summary(run_dir, {})
    assert summary["harness/tiny_choice/acc"] == group["score"]
    assert "tiny_choice" in write_run_report(run_dir).read_text()


def test_written_answers_are_samples_once_per_filter(tmp_path):
    rows = [*ROWS, ROWS[0]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [f"{row['question']} " for row in rows]
    scorer = Scorer(RecurrentModel(), ByteTokenizer())
    written = scorer.generate([[BYTES, *prompt.encode()] for prompt in prompts], Sampling(max_tokens=12))
    rights = [text == written[0] for text in written]
    assert 2 <= sum(rights) < 4
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    target = json.dumps(written[0])[1:-1]
    text = WRITE_TASK.format(data=tmp_path / "rows.jsonl", cache=tmp_path / "cache", target=target)
    (tasks / "tiny_write.yaml").write_text(text)
    config = EvalConfig(harness_folder=str(tasks), harness_tasks=("tiny_write",))
    result = get_task("harness").run(fake_subject(), config, False)
    assert result["questions"] == {"tiny_write": 4}
    groups = {name: (part["score"], part["samples"]) for name, part in result["groups"].items()}
    assert groups == {"tiny_write/as-written": (25.0 * sum(rights), 4), "tiny_write/digits": (0.0, 4)}
    shown = [one for one in result["samples"] if one["group"] == "tiny_write/as-written"]
    assert [one["prompt"] for one in shown] == prompts
    assert [one["output"] for one in shown] == written
    assert [one["score"] for one in shown] == rights
    # The row that is there twice: two samples, each with its id.
    assert shown[3]["id"] == f"{shown[0]['id']}-2"
    scalars = get_task("harness").scalars(result)
    assert scalars["harness/tiny_write/exact_match,as-written"] == 25.0 * sum(rights)


def test_a_harness_task_needs_its_folder():
    with pytest.raises(ValueError, match=r"set evals\.harness_folder"):
        EvalConfig(tasks=("harness",))
    config = EvalConfig(tasks=("harness",), harness_folder="/nowhere", harness_tasks=("x",))
    with pytest.raises(ValueError, match=r"evals\.harness_folder = /nowhere"):
        get_task("harness").settings(config)
