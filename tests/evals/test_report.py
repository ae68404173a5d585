"""Summary and report from a written run folder: keys, escaping, absent parts."""

from __future__ import annotations

import json
import platform
import re

import pytest

from evals.report import _harness, _held_out, write_run_report
from evals.summary import read_metrics, read_results, write_summary
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import parameter_counts
from trellis_dist.report import Report

SCRIPT = "<script>alert('corpus')</script>"
ENTRY = {"loss": 3.0, "bits_per_byte": 1.5}
SHARE = {"score": 10.0, "low": 1.0, "high": 30.0}
RESULTS = {
    "perplexity": {
        "model": ENTRY,
        "bigram": {"loss": 4.0, "bits_per_byte": 2.0, "lower_order": "kneser_ney"},
        "unigram": {"loss": 6.0, "bits_per_byte": 3.0},
        "uniform": {"loss": 8.3, "bits_per_byte": 4.0},
        "ln_vocab": 8.3,
        "targets": 1000,
        "bytes": 3000,
        "ngram_training_targets": 50_000,
        "training_targets": 80_000,
        "by_position": [{"from": 0, "to": 16, "tokens": 10, "loss": 4.0}],
    },
    "niah_single_1": {
        "title": "a number in repeated noise",
        "rows": [{"length": 1024, "samples": 10, "generation": SHARE, "choice": SHARE}],
        "chance": {"generation": 0.0, "choice": 10.0},
        "oracle": {"samples": 8, "generation": 100.0, "choice": 100.0},
    },
    "vt": {
        "title": "variables that share a value",
        "rows": [{"length": 2048, "samples": 10, "generation": SHARE}],
        "chance": {"generation": 0.0},
        "oracle": {"samples": 8, "generation": 100.0},
    },
    "mqar": {"groups": {"4/256": SHARE | {"samples": 10}}, "chance": 0.02, "oracle": 100.0},
    "decode": {
        "model": [{"position": 1024, "state_bytes": 100, "ms_per_token": 1.0}],
        "attention": [{"position": 1024, "state_bytes": 900, "ms_per_token": 2.0}],
        "model_parameters": 5,
        "attention_parameters": 4,
        "model_method": "read",
        "attention_method": "filled",
        "device": "cpu",
        "threads": 1,
        "timed_steps": 24,
    },
    "sample": {"prompt": SCRIPT, "continuation": SCRIPT, "actual": SCRIPT},
}
METRICS = [
    {"step": 1, "tokens": 512, "loss/train": 8.0, "perf/tokens_per_second": 100.0},
    {"step": 2, "tokens": 1024, "loss/train": 7.0, "loss/validation": 7.5, "perf/tokens_per_second": 300.0},
    {"step": 2, "tokens": 1024, "loss/train": 6.5, "perf/tokens_per_second": 500.0},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "evals").mkdir()
    for task, result in RESULTS.items():
        for step in (1, 2):
            record = {
                "task": task,
                "step": step,
                "key": "k",
                "data": "0123456789abcdef",
                "seconds": 1.0,
                "result": result,
            }
            (tmp_path / "evals" / f"{task}-step-{step}.json").write_text(json.dumps(record))
    lines = "".join(json.dumps(row) + "\n" for row in METRICS)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 3, "tok')
    model = {"num_layers": 2, "dim": 64, "num_heads": 2, "vocab_size": 4096}
    recipe = {"name": f"quick {SCRIPT}", "model": model, "data": {"directory": "d", "sequence_length": 512}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def test_summary_has_the_keys_of_the_contract(run):
    summary = write_summary(run, {"train": 12.5, "prepare": 3})
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["validation/bits_per_byte"] == 1.5
    assert summary["validation/loss"] == 3.0
    assert summary["baseline/bigram_bits_per_byte"] == 2.0
    assert summary["baseline/unigram_bits_per_byte"] == 3.0
    assert summary["ln_vocab"] == 8.3
    assert summary["perf/tokens_per_second"] == 300.0  # the median; the step written twice counts once
    assert summary["seconds/train"] == 12.5
    assert summary["niah_single_1/choice/1024"] == 10.0
    assert summary["niah_single_1/choice/chance"] == 10.0
    assert summary["niah_single_1/generation/oracle"] == 100.0
    assert summary["vt/2048"] == summary["mqar/4/256"] == 10.0
    assert (summary["vt/chance"], summary["vt/oracle"], summary["mqar/oracle"]) == (0.0, 100.0, 100.0)
    assert summary["decode/model/state_bytes/1024"] == 100
    assert summary["decode/attention/ms_per_token/1024"] == 2.0
    assert summary["step"] == summary["step/train"] == summary["step/decode"] == 2
    assert "loss/validation" not in summary  # of some rows; validation/loss is of the whole split


def test_tasks_without_a_part_of_their_own_give_their_scalars(run):
    results = {
        "context_length": {"rows": [{"length": 512, "bits_per_byte": 1.25}]},
        "harness": {
            "results": {"one": {"acc": 0.5}, "all": {"acc": 0.25}},
            "questions": {"one": 8},
            "harness_version": "0",
            "groups": {},
        },
    }
    for task, result in results.items():
        record = {"task": task, "step": 4, "key": "k", "data": "d", "seconds": 1.0, "result": result}
        (run / "evals" / f"{task}-step-4.json").write_text(json.dumps(record))
    summary = write_summary(run, {})
    assert (summary["context_length/512"], summary["step/context_length"]) == (1.25, 4)
    assert (summary["step/vt"], summary["step/train"]) == (2, 2)
    assert "step" not in summary, "one step is named for what is of two"
    assert (summary["harness/one/acc"], summary["harness/all/acc"]) == (50.0, 25.0)
    report = Report("a group")
    _harness(report, results["harness"])  # a group of tasks has no questions of its own


def test_report_names_the_step_of_each_task(run):
    assert "<dt>Last step trained" not in write_run_report(run).read_text(), "it is the one of the scores"
    record = json.loads((run / "evals" / "vt-step-2.json").read_text()) | {"step": 4}
    (run / "evals" / "vt-step-4.json").write_text(json.dumps(record))
    page = write_run_report(run).read_text()
    assert (page.count("Scored at step 2."), page.count("Scored at step 4.")) == (5, 1)
    assert "eval: vt, step 4" in page
    assert "<dt>Last step trained</dt><dd>2<" in page
    assert "<dt>Step<" not in page


def test_a_line_cut_short_and_a_step_written_twice_are_read_right(run):
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss/train"] == 6.5
    assert rows[1]["loss/validation"] == 7.5


def test_report_is_complete_and_escaped(run):
    write_summary(run, {"train": 12.5})
    page = write_run_report(run).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    for text in ("Where the time went", "12.5", "Kneser-Ney", "near chance on generation", "oracle", "2.000"):
        assert text in page, text
    for text in (
        "a number in repeated noise",
        "RULER: variables that share",
        "4 pairs in 256 tokens",
        "10 (1-30)",
    ):
        assert text in page, text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def _append(run, *rows):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))


def test_a_skipped_step_is_left_out(run):
    _append(run, {"step": 4, "tokens": 2048, "loss/train": None, "perf/tokens_per_second": 300.0})
    assert "loss/train" not in read_metrics(run)[-1]
    assert write_summary(run, {})["loss/train"] == 6.5
    assert "Loss while training" in write_run_report(run).read_text()


def test_bits_per_byte_are_drawn_for_the_whole_split_only(run):
    title = "Held-out text while training"
    assert title not in write_run_report(run).read_text()  # the loss was of some rows, the score is one point
    _append(run, {"step": 1, "tokens": 512, "validation/bits_per_byte": 1.75})
    assert title in write_run_report(run).read_text()
    results = read_results(run)
    assert _held_out(read_metrics(run), results["perplexity"]) == [(512, 1.75), (1024, 1.5)]


def test_report_names_what_was_trained_on_what(run):
    write_summary(run, {"train": 12.5, "first_loss": 61.5})
    page = write_run_report(run).read_text()
    facts = {"Corpus": "0123456789ab", "Python": platform.python_version(), "ln V, the loss": "8.318"}
    for name, value in facts.items():
        assert re.search(f"<dt>{name}[^<]*</dt><dd>{value}</dd>", page), name
    recipe = json.loads((run / "recipe.json").read_text())
    count = parameter_counts(ModelConfig(**recipe["model"])).total
    assert f"<dt>Parameters</dt><dd>{count:,}</dd>" in page
    assert "50,000 of 80,000 training tokens" in page
    assert "whole documents held out; near-duplicates are not removed yet" in page
    assert "Time to the first loss line: 61.5 seconds" in page
    assert "<td>first_loss" not in page


def test_only_a_small_model_is_called_small(run):
    assert "A model this small" in write_run_report(run).read_text()
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["model"] |= {"dim": 512, "num_layers": 8}
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert "A model this small" not in write_run_report(run).read_text()


def test_report_of_a_run_that_was_not_scored_yet(run):
    for path in (run / "evals").glob("*.json"):
        path.unlink()
    (run / "metrics.jsonl").unlink()
    assert "no data yet" in write_run_report(run).read_text()
    assert "validation/bits_per_byte" not in write_summary(run, {})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no run folder \(it has no recipe.json\)"):
        write_run_report(tmp_path)
