"""A run folder is scored: same targets for every model, results re-used, events at the training step."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.loader import TokenDataset
from evals.config import EvalConfig
from evals.evaluate import evaluate_run
from evals.ngram import InterpolatedBigram, count_ngrams
from evals.report import write_run_report
from evals.runs import load_run
from evals.summary import write_summary
from evals.tasks.perplexity import TASK as PERPLEXITY
from evals.tasks.perplexity import _positions
from tests.evals.conftest import LENGTH, VOCAB, write_checkpoint

SMALL = EvalConfig(
    needle_lengths=(512,), needle_samples=3, decode_positions=(16, 64), sample_tokens=8, device="cpu"
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
    assert set(first) == {"perplexity", "needle", "decode", "sample"}
    for task in first:
        assert json.loads((run_dir / "evals" / f"{task}-step-7.json").read_text()) == first[task]
    monkeypatch.setattr("evals.evaluate.load_run", _never)
    assert evaluate_run(run_dir, SMALL, progress=False) == first
    monkeypatch.undo()
    changed = evaluate_run(
        run_dir, replace(SMALL, sample_tokens=4, tasks=("sample", "needle")), progress=False
    )
    assert changed["needle"] == first["needle"]
    assert changed["sample"]["key"] != first["sample"]["key"]
    write_checkpoint(run_dir, step=9, seed=1)
    newer = evaluate_run(run_dir, replace(SMALL, tasks=("sample",)), progress=False)
    assert newer["sample"]["step"] == 9
    assert (run_dir / "evals" / "sample-step-7.json").is_file()
    _check_report(run_dir)


def _never(*args, **kwargs):
    pytest.fail("the model was loaded although every result was there")


def _check_report(run_dir):
    summary = write_summary(run_dir, {"eval": 1.0})
    assert summary["needle/choice/oracle"] == summary["needle/generation/oracle"] == 100
    assert summary["needle/choice/chance"] == 10
    sizes = {summary[f"decode/model/state_bytes/{p}"] for p in (16, 64)}
    assert len(sizes) == 1
    assert summary["decode/attention/state_bytes/64"] > summary["decode/attention/state_bytes/16"]
    page = write_run_report(run_dir).read_text()
    assert f"{summary['validation/bits_per_byte']:.3f}" in page


def test_tensorboard_has_the_scores_at_the_training_step(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluate_run(run_dir, replace(SMALL, tasks=("perplexity",)), progress=False)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("eval/bits_per_byte")
    assert [event.step for event in scalars] == [7]


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
