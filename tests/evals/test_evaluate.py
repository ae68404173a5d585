"""A run folder is scored: same targets for every model, results re-used, events at the training step."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints.export import export_model
from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import fingerprint_of, load_manifest, write_manifest
from evals.config import EvalConfig
from evals.evaluate import _about, check_eval_inputs, evaluate_run, job_of
from evals.ngram import InterpolatedBigram, count_ngrams
from evals.report import write_run_report
from evals.runs import find_checkpoint, load_run
from evals.subjects import load_subject
from evals.summary import write_summary
from evals.tasks.perplexity import TASK as PERPLEXITY
from evals.tasks.perplexity import _positions
from evals.tasks.registry import get_task
from tests.evals.conftest import LENGTH, VOCAB, write_checkpoint

SMALL = EvalConfig(
    ruler_lengths=(512,), ruler_samples=3, decode_positions=(16, 64), sample_tokens=8, device="cpu"
)


class BigramModel(torch.nn.Module):
    """A language model whose logits are a bigram's log-probabilities."""

    def __init__(self, bigram):
        super().__init__()
        table = np.log(np.stack([bigram.distribution(v) for v in range(VOCAB)]))
        self.output_weight = torch.nn.Parameter(torch.from_numpy(table.T.copy()))

    def hidden(self, tokens, *, cu_seqlens=None):
        return F.one_hot(tokens, VOCAB).double()


def test_a_model_with_the_bigrams_logits_gets_the_bigrams_bits_per_byte(run_dir):
    loaded = load_run(run_dir, device="cpu")
    train = TokenDataset(loaded.dataset_dir, "train", sequence_length=LENGTH, seed=0)
    counts = count_ngrams([train.tokens_of(i) for i in range(train.num_documents)], VOCAB)
    model = BigramModel(InterpolatedBigram(counts, lower="kneser_ney"))
    result = PERPLEXITY.run(replace(loaded, model=model), EvalConfig(), False)
    expected = result["bigram_by_lower_order"]["kneser_ney"]
    assert result["model"]["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-9)
    assert result["bigram"]["bits_per_byte"] < result["unigram"]["bits_per_byte"]


def test_every_held_out_token_is_scored_once(run_dir):
    loaded = load_run(run_dir, device="cpu")
    result = PERPLEXITY.run(loaded, EvalConfig(), False)
    split = TokenDataset(loaded.dataset_dir, "validation", sequence_length=LENGTH, seed=0)
    assert result["targets"] == split.num_tokens - split.num_documents
    assert sum(bucket["tokens"] for bucket in result["by_position"]) == result["targets"]
    assert result["bytes"] == split.num_bytes
    # A fresh model knows nothing: its loss is that of a uniform guess.
    assert result["model"]["loss"] == pytest.approx(math.log(VOCAB), rel=0.02)
    uniform = result["targets"] * math.log2(VOCAB) / result["bytes"]
    assert result["uniform"]["bits_per_byte"] == pytest.approx(uniform)


def test_positions_count_from_the_start_of_the_document_in_its_row():
    class Packed:
        tokens = torch.zeros(2, 4)
        cu_seqlens = torch.tensor([0, 3, 4, 8], dtype=torch.int32)

    assert _positions(Packed).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_results_are_reused_until_something_they_depend_on_changes(run_dir, monkeypatch):
    first = evaluate_run(run_dir, SMALL, progress=False)
    assert set(first) == {"perplexity", "niah_single_1", "decode", "sample"}
    _check_events(run_dir, first)
    for task in first:
        assert json.loads((run_dir / "evals" / f"{task}-step-7.json").read_text()) == first[task]
    monkeypatch.setattr("evals.evaluate.load_run", _never)
    assert evaluate_run(run_dir, SMALL, progress=False) == first
    monkeypatch.undo()
    changed = evaluate_run(
        run_dir, replace(SMALL, sample_tokens=4, tasks=("sample", "niah_single_1")), progress=False
    )
    assert changed["niah_single_1"] == first["niah_single_1"]
    assert changed["sample"]["key"] != first["sample"]["key"]
    write_checkpoint(run_dir, step=9, seed=1)
    newer = evaluate_run(run_dir, replace(SMALL, tasks=("sample",)), progress=False)
    assert newer["sample"]["step"] == 9
    assert (run_dir / "evals" / "sample-step-7.json").is_file()
    _check_report(run_dir)


def test_the_model_section_is_part_of_a_key(run_dir):
    def key():
        job = job_of(run_dir, find_checkpoint(run_dir), get_task("sample"), SMALL)
        about = _about(load_run(run_dir, device="cpu"), get_task("sample"), SMALL)
        return job.key, about["key"]

    before, file = key(), run_dir / "recipe.json"
    text = file.read_text()
    recipe = json.loads(text)
    recipe["model"]["trellis"]["chunk_size"] *= 2
    file.write_text(json.dumps(recipe))
    try:
        assert all(one != other for one, other in zip(before, key()))
    finally:
        file.write_text(text)
    assert key() == before


def _never(*args, **kwargs):
    pytest.fail("the model was loaded although every result was there")


def _check_report(run_dir):
    summary = write_summary(run_dir, {"eval": 1.0})
    assert summary["niah_single_1/choice/oracle"] == summary["niah_single_1/generation/oracle"] == 100
    assert summary["niah_single_1/choice/chance"] == 10
    sizes = {summary[f"decode/model/state_bytes/{p}"] for p in (16, 64)}
    assert len(sizes) == 1
    assert summary["decode/attention/state_bytes/64"] > summary["decode/attention/state_bytes/16"]
    page = write_run_report(run_dir).read_text()
    assert f"{summary['validation/bits_per_byte']:.3f}" in page


def _check_events(run_dir, records):
    """TensorBoard reads back every score, at the training step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    expected = {}
    for task, record in records.items():
        expected |= get_task(task).scalars(record["result"])
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"eval/bits_per_byte", "niah_single_1/choice/512", "decode/state_bytes"} <= set(expected)
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (7, pytest.approx(value, rel=1e-6)), name


def test_another_data_set_than_the_one_trained_on_is_refused(run_dir, dataset_dir, tmp_path):
    trained = load_manifest(dataset_dir).fingerprint
    other = shutil.copytree(dataset_dir, tmp_path / "other")
    manifest = load_manifest(other)
    changed = fingerprint_of("another", manifest.tokenizer["sha256"], manifest.splits)
    write_manifest(other, replace(manifest, config_digest="another", fingerprint=changed))
    with pytest.raises(ValueError, match=f"holds the data set {changed}, but .* was trained on {trained}: "):
        evaluate_run(run_dir, SMALL, progress=False, dataset_dir=other)
    with pytest.raises(ValueError, match="restore that data set, or name its folder with --dataset-dir"):
        load_run(run_dir, dataset_dir=other)


def test_another_tokenizer_than_the_manifests_is_refused(run_dir, dataset_dir, tmp_path):
    other = shutil.copytree(dataset_dir, tmp_path / "other")
    (other / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"tokenizer\.model has sha256 .* restore the file"):
        load_run(run_dir, dataset_dir=other)


def test_a_data_set_that_moved_is_asked_for_and_found_where_it_is_now(run_dir, dataset_dir, tmp_path):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    gone = tmp_path / "gone"
    recipe["data"]["directory"] = str(gone)
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(FileNotFoundError, match=f"not in {gone}: move it back, or .*--dataset-dir FOLDER"):
        evaluate_run(run_dir, SMALL, progress=False)
    config = replace(SMALL, tasks=("sample",))
    record = evaluate_run(run_dir, config, progress=False, dataset_dir=dataset_dir)["sample"]
    assert record["data"] == load_manifest(dataset_dir).fingerprint


def test_the_device_and_not_auto_is_part_of_a_results_key(run_dir):
    settings = get_task("decode").settings
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert settings(EvalConfig())["device"] == expected
    assert settings(EvalConfig(device="cpu"))["device"] == "cpu"


def test_missing_inputs_are_refused_before_training(tmp_path):
    check_eval_inputs(SMALL)
    essay = replace(SMALL, tasks=("niah_multiquery",), ruler_essay=str(tmp_path / "essay.txt"))
    with pytest.raises(FileNotFoundError, match=r"evals\.ruler_essay = .*essay\.txt: no such file"):
        check_eval_inputs(essay)
    (tmp_path / "essay.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"evals\.ruler_essay = .*essay\.txt: not UTF-8"):
        check_eval_inputs(essay)
    harness = EvalConfig(tasks=("harness",), harness_folder=str(tmp_path / "none"), harness_tasks=("x",))
    with pytest.raises(ValueError, match=r"evals\.harness_folder = .*none"):
        check_eval_inputs(harness)


def test_a_damaged_result_is_made_again(run_dir):
    config = replace(SMALL, tasks=("sample",))
    first = evaluate_run(run_dir, config, progress=False)
    (run_dir / "evals" / "sample-step-7.json").write_text('{"key"')
    assert evaluate_run(run_dir, config, progress=False)["sample"]["result"] == first["sample"]["result"]


def test_weights_come_from_the_step_asked_for(run_dir):
    write_checkpoint(run_dir, step=9, seed=1)
    seven, nine, newest = (load_run(run_dir, step=step, device="cpu") for step in (7, 9, None))
    assert (seven.step, nine.step, newest.step) == (7, 9, 9)
    assert torch.equal(newest.model.embedding_weight, nine.model.embedding_weight)
    assert not torch.equal(seven.model.embedding_weight, nine.model.embedding_weight)
    assert seven.digest != nine.digest == newest.digest


def test_what_cannot_be_scored_is_refused_with_the_remedy(run_dir, tmp_path):
    (run_dir / "checkpoints" / "step-foo").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint of step 3: it has 7"):
        load_run(run_dir, step=3)
    with pytest.raises(ValueError, match="is no run folder"):
        load_run(tmp_path / "nowhere")
    for path in (run_dir / "checkpoints" / "step-00000007").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(ValueError, match="damaged"):
        load_run(run_dir, step=7)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="no verified checkpoint"):
        load_run(run_dir)


def test_a_recipe_of_another_model_is_refused(run_dir):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe["model"]["dim"] = 64
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="do not belong together"):
        load_run(run_dir, device="cpu")


def test_an_exported_folder_gives_the_logits_of_its_run(run_dir, tmp_path):
    run = load_run(run_dir, device="cpu")
    export_model(
        run.checkpoint,
        tmp_path / "out",
        tokenizer=run.dataset_dir / "tokenizer.model",
        model_config=run.recipe["model"],
    )
    subject = load_subject(tmp_path / "out", device="cpu")
    model, tokenizer = subject.model, subject.tokenizer
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens), run.model(tokens))
    assert tokenizer.sha256 == run.tokenizer.sha256
    again = load_subject(run_dir, device="cpu").model
    assert torch.equal(again(tokens), run.model(tokens))
