"""Recall, reasoning items, speeds and gates held open, on a small run."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.config import EvalConfig
from evals.figures.ablation import losses_held_open
from evals.figures.reasoning import against_prose, item_texts, prose_stretches
from evals.figures.retrieval import mqar_items, needle_items, span_of
from evals.figures.speed import prefill_speeds
from evals.figures.trace import held_open, trace
from evals.ruler.catalogue import RULER
from evals.runs import load_run
from evals.states import context_ids
from tests.evals.conftest import write_dataset, write_run

LENGTH = 640


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    write_dataset(folder / "data")
    return load_run(write_run(folder / "runs" / "tiny", folder / "data"), device="cpu")


def question(run, index):
    make = RULER["niah_single_1"].questions("")
    return make(seed=42, length=LENGTH, index=index, encode=lambda text: context_ids(run.tokenizer, text))


def test_the_span_of_a_needle_is_what_lies_between_it_and_its_question(run):
    for index in range(6):
        asked = question(run, index)
        first, end = span_of(run, asked)
        value = asked.answers[0]
        before, between = (run.tokenizer.decode(ids) for ids in (asked.ids[:first], asked.ids[first:end]))
        assert value in before.replace(" ", "")
        assert value not in between.replace(" ", "")
        assert "What is the special" not in between
        assert "What is the special" in run.tokenizer.decode(asked.ids[end:])


def test_what_is_kept_of_a_needle_is_the_product_of_the_gates_in_its_gap(run):
    items, shares = needle_items(run, lengths=[LENGTH], count=4, piece=100)
    assert (items.groups, items.layers) == ((str(LENGTH),) * 4, (0, 1))
    assert set(items.right) <= {0.0, 1.0}
    (row,) = shares
    assert (row["group"], row["items"], row["chance"]) == (str(LENGTH), 4, 10.0)
    assert row["low"] <= row["percent"] == 100 * items.right.mean() <= row["high"]
    asked = question(run, 2)
    first, end = span_of(run, asked)
    seen = trace(run.model, torch.tensor([asked.ids]), piece=LENGTH)
    kept = seen.gate[0, ..., first:end].double().prod(-1)  # what is left of a needle
    np.testing.assert_allclose(np.exp(items.retention[2, :, 0]), kept, rtol=1e-3)
    assert items.retention.shape == (4, 2, 1, seen.gate.shape[2])


def test_rows_of_multi_query_recall(run):
    config = EvalConfig(mqar_pairs=(2, 4), mqar_length=(32, 64))
    items, shares = mqar_items(run, config, count=5, piece=32)
    assert items.groups == ("2/32",) * 5 + ("4/32",) * 5
    assert [share["group"] for share in shares] == ["2/32", "4/32"]
    assert items.retention.shape[:2] == (10, 2)
    assert (items.retention < 0).all()
    assert items.chance == {"2/32": 50.0, "4/32": 25.0}


def test_items_are_set_beside_prose_of_their_length(run, tmp_path):
    rows = [
        {"goal": f"How to fold {n} sheets?", "sol1": "Fold.", "sol2": "Eat.", "label": n % 2}
        for n in range(4)
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = item_texts(tmp_path, limit=3)
    assert list(texts) == ["piqa"]
    assert [text.split()[-1] for text in texts["piqa"]] == ["Fold.", "Eat.", "Fold."]
    prose = run.tokenizer.encode("A quiet river ran past the old mill and on. " * 40)
    read = [context_ids(run.tokenizer, text) for text in texts["piqa"]]
    stretches = prose_stretches(run, prose, [len(ids) for ids in read])
    assert [len(ids) for ids in stretches] == [len(ids) for ids in read]
    found = against_prose(run, texts["piqa"], prose, piece=16)
    seen = [trace(run.model, torch.tensor([ids]), piece=16) for ids in (*read, *stretches)]
    gates = [float(one.gate[0, 1].double().mean()) for one in seen]
    norms = [float(one.key_norm[0, 1, :, -1].double().mean()) for one in seen]
    assert found[1]["gate"]["items"] == pytest.approx(np.mean(gates[:3]))
    apart = np.mean(gates[:3]) - np.mean(gates[3:])
    assert found[1]["gate"]["difference"]["difference"] == pytest.approx(apart)
    assert found[1]["key_norm"]["prose"] == pytest.approx(np.mean(norms[3:]))
    with pytest.raises(ValueError, match="give a longer --text"):
        against_prose(run, texts["piqa"], prose[:9], piece=16)
    with pytest.raises(ValueError, match="no file of lambada"):
        item_texts(tmp_path / "none", limit=3)


def test_the_loss_as_trained_is_the_models_own(run):
    ids = run.tokenizer.encode("def f(x):\n    return x + 1\n" * 24)
    found = losses_held_open(run, ids)
    assert list(found) == ["none", "layer 0", "layer 1", "all"]
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = run.model(row)[0, :-1]
    own = F.cross_entropy(logits, row[0, 1:], reduction="none")
    assert found["none"]["loss"] == pytest.approx(float(own.mean()), rel=1e-5)
    assert len({one["loss"] for one in found.values()}) == 4
    with torch.no_grad(), held_open(run.model, [1]):
        opened = F.cross_entropy(run.model(row)[0, :-1], row[0, 1:], reduction="none")
    blocks = len(own) // 64 * 64
    told = found["layer 1"]["difference"]
    assert told["items"] == blocks // 64
    assert told["difference"] == pytest.approx(float((opened - own)[:blocks].mean()), abs=1e-6)
    assert told["low"] <= told["difference"] <= told["high"]


def test_speed_is_the_median_of_the_readings_after_the_first(run):
    times = iter([0.0, 9.0, 10.0, 11.0, 20.0, 24.0, 30.0, 32.0])
    ((found,),) = prefill_speeds([run], [64], repeats=3, clock=lambda: next(times))
    assert found == {"tokens": 64, "tokens_per_second": 32.0, "slowest": 16.0, "fastest": 64.0}


def test_runs_are_timed_in_turns(run):
    seconds = iter([9.0, 9.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])  # of the warm-up, then of each turn
    times = iter([time for one in seconds for time in (0.0, one)])
    first, second = prefill_speeds([run, run], [64], repeats=3, clock=lambda: next(times))
    assert [row["tokens_per_second"] for row in (*first, *second)] == [64.0, 32.0]
