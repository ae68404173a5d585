"""Associative recall: the rows, the task's scoring, and a tiny model that learns it and passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from evals import mqar
from evals.config import EvalConfig
from evals.mqar import POWER, Pieces, find_pieces, make_rows, predict
from evals.oracle import RecallModel
from evals.scorer import Scorer
from evals.subject import Subject
from evals.tasks.registry import get_task
from tests.evals.conftest import library_texts
from tests.evals.fakes import ByteTokenizer, RandomModel, RecurrentModel
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import build_language_model

PIECES = Pieces(keys=tuple(range(10, 90)), values=tuple(range(100, 180)), filler=5)
TASK = get_task("mqar")


class Letters:
    """BOS, EOS and one piece per letter."""

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg"
    bos_id, eos_id, vocab_size = 0, 1, 2 + len(letters)

    def encode(self, text):
        return [2 + self.letters.index(letter) for letter in text if letter in self.letters]

    def decode(self, ids):
        return "".join(self.letters[i - 2] for i in ids if i > 1)


def rows_of(*, pairs=8, length=64, indices=range(20), seed=3):
    return make_rows(PIECES, start=[1], pairs=pairs, length=length, indices=indices, seed=seed)


def subject(model, tokenizer):
    device = torch.device("cpu")
    return Subject(
        name="t", model=model, tokenizer=tokenizer, digest="d", tokenizer_digest="t", device=device
    )


@pytest.mark.parametrize("pairs,length", [(1, 4), (4, 16), (8, 64), (64, 512)])
def test_every_key_is_asked_once_and_its_value_is_what_followed_it(pairs, length):
    rows = rows_of(pairs=pairs, length=length)
    assert rows.tokens.shape == (20, 1 + length)
    for tokens, asked, answers in zip(rows.tokens.tolist(), rows.asked.tolist(), rows.answers.tolist()):
        assert tokens[0] == 1
        keys, values = tokens[1 : 1 + 2 * pairs : 2], tokens[2 : 2 + 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(PIECES.keys)
        assert set(values) <= set(PIECES.values)
        assert asked == sorted(asked)
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        assert answers == [values[keys.index(tokens[place])] for place in asked]
        rest = [i for i in range(1 + 2 * pairs, 1 + length) if i not in asked]
        assert {tokens[i] for i in rest} <= {PIECES.filler}
        assert all((place - 1 - 2 * pairs) % 2 == 0 for place in asked)


def test_labels_are_the_answers_where_they_are_asked_for():
    rows = rows_of()
    labels = rows.labels()
    assert torch.equal(labels.gather(1, rows.asked), rows.answers)
    assert int((labels != -100).sum()) == rows.answers.numel()


def test_a_row_depends_on_its_index_seed_and_shape_alone():
    rows, again = rows_of(), rows_of(indices=[7, 5])
    assert torch.equal(again.tokens, rows.tokens[[7, 5]])
    assert torch.equal(again.answers, rows.answers[[7, 5]])
    assert not torch.equal(rows_of(seed=4).tokens, rows.tokens)
    assert len({tuple(row) for row in rows.tokens.tolist()}) == 20


def test_gaps_follow_the_power_law():
    rows = rows_of(pairs=1, length=22, indices=range(3000))
    places = torch.div(rows.asked[:, 0] - 3, 2, rounding_mode="floor")
    counts = np.bincount(places.numpy(), minlength=10)
    weights = np.arange(1, 11) ** (POWER - 1.0)
    expected = 3000 * weights / weights.sum()
    # chi-square of 10 bins: 21.7 is its 1% point; a uniform gap gives over 2000
    assert ((counts - expected) ** 2 / expected).sum() < 21.7


def test_pieces_are_ordinary_and_of_two_kinds():
    documents = library_texts()
    tokenizer = Tokenizer(train_tokenizer(TokenizerConfig(vocab_size=2048, threads=1), documents))
    pieces = find_pieces(tokenizer, pairs=64)
    every = [pieces.filler, *pieces.keys, *pieces.values]
    assert len(set(every)) == len(every) > 1500
    assert max(pieces.keys) < min(pieces.values)
    assert abs(len(pieces.keys) - len(pieces.values)) <= 1
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(every)
    assert all(tokenizer.encode(tokenizer.decode([piece])) == [piece] for piece in every)


def test_of_a_large_vocabulary_as_many_pieces_are_taken_as_in_the_paper(monkeypatch):
    monkeypatch.setattr(mqar, "MOST", 20)
    pieces = find_pieces(ByteTokenizer(), pairs=20)
    assert len(pieces.keys) == len(pieces.values) == 20
    assert max(pieces.values) > 100  # a sample of all, not the first


def test_too_few_pieces_are_refused():
    with pytest.raises(ValueError, match=r"evals.mqar_pairs = 17 needs 35 .* has 33: use fewer pairs"):
        find_pieces(Letters(), pairs=17)


@pytest.mark.parametrize("budget", [1, 5000, 2**25])
def test_pieces_and_batches_of_rows_change_no_prediction(budget, monkeypatch):
    model = RecurrentModel()
    rows = rows_of(indices=range(6))
    whole, _ = model.prefill(rows.tokens, model.init_state(6))
    expected = whole[..., : ByteTokenizer.vocab_size].argmax(-1).gather(1, rows.asked)
    monkeypatch.setattr(mqar, "LOGIT_BUDGET", budget)
    monkeypatch.setattr(mqar, "BATCH_TOKENS", 130)
    assert torch.equal(predict(Scorer(model, ByteTokenizer(), prefill_chunk=5), rows), expected)


def test_rows_of_a_model_without_a_piece_are_never_predicted():
    class Wide(RandomModel):
        """More rows than the tokenizer has pieces, the last the most probable."""

        def prefill(self, tokens, state, *, last_only=False):
            logits, state = super().prefill(tokens, state, last_only=last_only)
            return torch.nn.functional.pad(logits, (0, 3), value=100.0), state

    assert predict(Scorer(Wide(), ByteTokenizer()), rows_of()).max() < ByteTokenizer.vocab_size


@pytest.mark.parametrize(
    "model,low,high", [(RecallModel(ByteTokenizer.vocab_size), 100, 100), (RandomModel(), 0, 4)]
)
def test_looking_up_scores_100_and_chance_about_nothing(model, low, high):
    config = EvalConfig(mqar_pairs=(2, 16), mqar_length=(64, 128), mqar_samples=20)
    result = TASK.run(subject(model, ByteTokenizer()), config, False)
    assert list(result["groups"]) == ["2/64", "2/128", "16/64", "16/128"]
    assert all(low <= part["score"] <= high for part in result["groups"].values())
    assert result["oracle"] == 100
    assert result["chance"] == pytest.approx(100 / 258)
    assert TASK.scalars(result) == {f"mqar/{g}": part["score"] for g, part in result["groups"].items()}
    assert len({sample["id"] for sample in result["samples"]}) == 80
    assert {sample["length"] for sample in result["samples"]} == {64, 128}


def test_the_score_is_the_mean_over_the_questions():
    class Half(RecallModel):
        """Looks up the keys with an even id only."""

        def _recall(self, history, position):
            return super()._recall(history, position) if history[position] % 2 == 0 else 0

    config = EvalConfig(mqar_pairs=(8,), mqar_length=(64,), mqar_samples=30)
    result = TASK.run(subject(Half(ByteTokenizer.vocab_size), ByteTokenizer()), config, False)
    pieces = find_pieces(ByteTokenizer(), pairs=8)
    rows = make_rows(pieces, start=[256], pairs=8, length=64, indices=range(30), seed=0)
    even = (rows.tokens.gather(1, rows.asked) % 2 == 0).double()
    assert 20 < 100 * even.mean() < 80
    assert result["groups"]["8/64"]["score"] == pytest.approx(100 * even.mean().item())
    assert [sample["score"] for sample in result["samples"]] == pytest.approx(even.mean(1).tolist())


def test_what_a_result_depends_on_is_in_its_settings():
    settings = TASK.settings(EvalConfig(mqar_pairs=(8, 4), mqar_length=(64,), mqar_samples=5, mqar_seed=2))
    assert settings == {"pairs": [4, 8], "length": [64], "samples": 5, "seed": 2}


STEPS, BATCH, PAIRS, LENGTH = 140, 64, 3, 12


def train(model):
    """AdamW on rows that are not those of the task (another seed)."""
    pieces = find_pieces(Letters(), pairs=PAIRS)
    rows = make_rows(
        pieces, start=[Letters.bos_id], pairs=PAIRS, length=LENGTH, indices=range(STEPS * BATCH), seed=1
    )
    labels = rows.labels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for start in range(0, STEPS * BATCH, BATCH):
        part = slice(start, start + BATCH)
        loss = model.loss_sum(rows.tokens[part], labels[part]) / (BATCH * PAIRS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def test_a_tiny_model_learns_to_recall_and_the_task_says_so():
    """One Trellis layer that corrects errors; one of the three values of a row would be a third of 100."""
    trellis = TrellisConfig(
        slots=64,
        chunk_size=16,
        update="corrected",
        phi="tanh",
        readout="silu_rms",
        step_bound="token",
        step_size_max=1.0,
    )
    config = ModelConfig(
        vocab_size=Letters.vocab_size, num_layers=1, dim=64, num_heads=1, mlp_hidden=64, trellis=trellis
    )
    model = build_language_model(config, seed=0)
    evaluation = EvalConfig(mqar_pairs=(PAIRS,), mqar_length=(LENGTH,), mqar_samples=200)

    def score():
        return TASK.run(subject(model.eval(), Letters()), evaluation, False)["groups"]["3/12"]["score"]

    assert score() < 15
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: more threads only wait for each other
    try:
        train(model.train())
    finally:
        torch.set_num_threads(threads)
    assert score() > 95
