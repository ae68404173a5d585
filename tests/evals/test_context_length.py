"""Losses by context length equal those computed from scratch, on the same targets; memory does not grow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipeline.loader import TokenDataset
from evals.config import EvalConfig
from evals.runs import load_run
from evals.scorer import Scorer
from evals.tasks import context_length
from evals.tasks.context_length import TARGETS, TASK, cut_windows, score_windows
from tests.evals.conftest import LENGTH, VOCAB
from tests.evals.fakes import ByteTokenizer, RecurrentModel
from tests.evals.memory import PeakBytes
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model


@pytest.fixture(scope="module")
def split(dataset_dir):
    return TokenDataset(dataset_dir, "validation", sequence_length=LENGTH, seed=0)


@pytest.fixture(scope="module")
def stream(split):
    return np.concatenate([split.tokens_of(i) for i in range(split.num_documents)])


def _place(stream, row):
    """Where a window lies in the documents put end to end."""
    found = [i for i in range(len(stream) - len(row) + 1) if np.array_equal(stream[i : i + len(row)], row)]
    assert len(found) == 1
    return found[0]


def test_windows_lie_in_one_document_each_where_enough_do(split, stream):
    windows = cut_windows(split, [16, 300], limit=4)
    assert (windows.whole, windows.longest, windows.tokens.shape) == (True, 300, (4, 300 + TARGETS))
    begins = np.cumsum([0] + [len(split.tokens_of(i)) for i in range(split.num_documents)])
    for row, is_target in zip(windows.tokens, windows.is_target):
        start = _place(stream, row)
        assert np.searchsorted(begins, start, "right") == np.searchsorted(
            begins, start + len(row) - 1, "right"
        )
        assert is_target.sum() == len(row) - (start in begins)


def test_documents_are_put_end_to_end_where_they_are_too_short(split, stream):
    size = max(len(split.tokens_of(i)) for i in range(split.num_documents))
    windows = cut_windows(split, [16, size, 10**6], limit=32)
    width = size + TARGETS
    assert (windows.whole, windows.longest) == (False, size)
    assert len(windows.tokens) == len(stream) // width
    assert np.array_equal(windows.tokens.ravel(), stream[: windows.tokens.size])
    assert np.array_equal(windows.tokens == split.bos_id, ~windows.is_target)
    assert (~windows.is_target).sum() > 1


def test_fewer_windows_than_there_are_spread_over_the_split(split, stream):
    windows = cut_windows(split, [16], limit=3)
    starts = [_place(stream, row) for row in windows.tokens]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert starts[-1] > 0.8 * len(stream)
    with pytest.raises(ValueError, match=r"evals.context_lengths = \[100000\]: the validation split has"):
        cut_windows(split, [100_000], limit=3)


def _model(pattern=("trellis",)):
    trellis = TrellisConfig(slots=8, chunk_size=16, gates=["learned"])
    config = ModelConfig(
        vocab_size=VOCAB, num_layers=1, dim=32, num_heads=2, pattern=pattern, trellis=trellis
    )
    return build_language_model(config, seed=0, dtype=torch.float64).eval()


@pytest.mark.parametrize("pattern", [("trellis",), ("attention",)])
def test_each_length_equals_a_pass_over_the_window_from_scratch(split, run_dir, pattern):
    tokenizer, model = load_run(run_dir, device="cpu").tokenizer, _model(pattern)
    windows = cut_windows(split, [16, 70, 2000], limit=2)
    assert not windows.is_target[:, -TARGETS:].all()  # a document begins among the targets
    scorer = Scorer(model, tokenizer, prefill_chunk=33)
    nats, by_position = score_windows(scorer, windows, [16, 70, 2000])
    for length in (16, 70, 2000):
        given = torch.from_numpy(windows.tokens[:, -length - TARGETS :])
        with torch.no_grad():
            log_probs = model(given[:, :-1]).log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]
        expected = -log_probs[:, -TARGETS:][torch.from_numpy(windows.is_target[:, -TARGETS:])].sum()
        assert nats[length] == pytest.approx(expected.item(), rel=1e-9)
    assert by_position.tokens.sum() == windows.is_target[:, 1:].sum()
    losses = -log_probs.numpy()
    assert by_position.loss.sum() == pytest.approx(losses[windows.is_target[:, 1:]].sum(), rel=1e-9)
    first = losses[:, :15][windows.is_target[:, 1:16]].mean()  # targets after 1 to 15 tokens
    assert by_position.rows()[0]["loss"] == pytest.approx(first, rel=1e-9)


def test_a_model_that_sees_one_token_scores_every_length_alike(split):
    model = RecurrentModel(vocab_size=VOCAB)
    model.recurrent.data.zero_()
    windows = cut_windows(split, [1, 16, 200], limit=3)
    nats, _ = score_windows(Scorer(model, ByteTokenizer()), windows, [1, 16, 200])
    assert nats[1] == pytest.approx(nats[16], rel=1e-12) == pytest.approx(nats[200], rel=1e-12)
    model.recurrent.data.fill_(0.2)
    nats, _ = score_windows(Scorer(model, ByteTokenizer()), windows, [1, 16, 200])
    assert nats[1] != pytest.approx(nats[16], rel=1e-6)


def test_the_task_says_what_was_scored(run_dir, split, monkeypatch):
    monkeypatch.setattr(context_length, "TARGETS", 32)
    config = EvalConfig(context_lengths=(64, 16, 10**6), context_documents=5)
    loaded = load_run(run_dir, device="cpu")
    result = TASK.run(loaded, config, False)
    assert [row["length"] for row in result["rows"]] == [16, 64]
    assert (result["skipped"], result["windows"], result["text"]) == ([10**6], 5, "documents")
    assert result["targets"] == 5 * 32
    assert result["trained_length"] == LENGTH
    assert result["longest_document"] == max(len(split.tokens_of(i)) for i in range(split.num_documents))
    for row in result["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        nats = row["loss"] * result["targets"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"])
    assert result["by_position"][-1]["to"] == 128
    assert TASK.scalars(result) == {
        "context_length/16": result["rows"][0]["bits_per_byte"],
        "context_length/64": result["rows"][1]["bits_per_byte"],
    }


def test_bytes_of_a_cut_character_count_once():
    tokenizer = ByteTokenizer()
    whole = tokenizer.encode("a\N{SNOWMAN}b")
    assert context_length._bytes(tokenizer, [tokenizer.bos_id, *whole, tokenizer.eos_id]) == 5
    assert context_length._bytes(tokenizer, whole[2:]) == 3
    assert context_length._bytes(tokenizer, whole[:2]) == 2


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"context_lengths": ()}, r"evals.context_lengths = \[\]"),
        ({"context_lengths": (0, 4)}, r"evals.context_lengths = \[0, 4\]: use 1 or more"),
        ({"context_documents": 0}, "evals.context_documents = 0: use 1 or more"),
    ],
)
def test_impossible_settings_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        EvalConfig(**wrong)


def _peak(model, length):
    tokens = torch.zeros(1, length, dtype=torch.long)
    scorer = Scorer(model, ByteTokenizer(), prefill_chunk=1024)
    state = model.init_state(1)
    with PeakBytes() as mode:
        scorer.read(tokens, state)
    return mode.peak


def test_reading_64k_tokens_takes_the_memory_of_8k():
    config = ModelConfig(
        vocab_size=258,
        num_layers=1,
        dim=16,
        num_heads=1,
        trellis=TrellisConfig(slots=4, chunk_size=256, gates=["learned"]),
    )
    model = build_language_model(config, seed=0).eval()
    short, long = _peak(model, 8 * 1024), _peak(model, 64 * 1024)
    assert 1024 * 16 * 4 < short < 10 * 2**20  # what one piece needs
    assert long <= 1.05 * short
    growing = _peak(_model(("attention",)), 1024), _peak(_model(("attention",)), 4096)
    assert growing[1] > 2 * growing[0]
