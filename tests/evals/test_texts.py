"""A named text through the scorer: a plain forward pass gives the same bits, for runs and for peers."""

from __future__ import annotations

import inspect
import json
import math
import string
import textwrap
from dataclasses import replace

import pytest
import torch

from evals.config import EvalConfig
from evals.evaluate import check_tasks, evaluate_subject
from evals.model_report import write_model_report
from evals.peer_codec import PeerCodec
from evals.peer_model import PeerModel
from evals.report import write_run_report
from evals.runs import load_run
from evals.scorer import Scorer
from evals.subject import Subject
from evals.tasks.registry import get_task
from evals.text_losses import score_text
from evals.text_windows import ROOM, TARGET, cut_stretches, encode_stretches
from evals.texts import read_documents, text_digest
from tests.evals.conftest import LENGTH
from tests.evals.fakes import ByteTokenizer, RecurrentModel
from tests.evals.test_peers import CONFIGS, fast_tokenizer, tiny

PERPLEXITY, LENGTHS = get_task("perplexity"), get_task("context_length")
DOCUMENTS = [
    inspect.getsource(textwrap)[:9000],
    "short",
    "\N{SNOWMAN} and \N{GREEK SMALL LETTER PI}\r\n",
    inspect.getsource(string)[:3000],
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The documents in files of both kinds."""
    folder = tmp_path_factory.mktemp("text") / "named"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_bytes(DOCUMENTS[0].encode())
    lines = [json.dumps({"text": document, "id": 3}) for document in ("", *DOCUMENTS[1:])]
    (folder / "more" / "b.jsonl").write_text("\n\n".join(lines))
    (folder / "c.md").write_text("not read")
    return folder


@pytest.fixture(scope="module")
def config(text):
    return EvalConfig(
        perplexity_text=str(text), context_lengths=(16, 64, 10**6), context_documents=3, ngram_max_tokens=2000
    )


def peer(name="llama", **given):
    """A model of transformers, one token per byte, BOS and EOS the same."""
    return Subject(
        name=name,
        model=PeerModel(tiny(CONFIGS[name]), trust="pieces"),
        tokenizer=PeerCodec(fast_tokenizer(), **given),
        digest="weights",
        tokenizer_digest="tokens",
        device=torch.device("cpu"),
    )


def bits_of(logits_of, ids, length):
    """From scratch: every row of a document in a forward pass of its own."""
    nats = 0.0
    for start in range(0, len(ids) - 1, length):
        row = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            log_probs = logits_of(row[:, :-1]).double().log_softmax(-1)
        nats -= float(log_probs.gather(-1, row[:, 1:, None]).sum())
    return nats / math.log(2)


def test_a_folder_s_documents_in_the_order_of_its_files(text, tmp_path):
    assert read_documents(text) == DOCUMENTS
    digest = text_digest(text)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    assert text_digest(tmp_path / "all.jsonl") == digest  # the content counts, not the files
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": d + "."}) + "\n" for d in DOCUMENTS))
    assert text_digest(tmp_path / "all.jsonl") != digest
    two = tmp_path / "two.jsonl"
    digests = set()
    for documents in (["ab", "c"], ["a", "bc"], ["abc"]):
        two.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        digests.add(text_digest(two))
    assert len(digests) == 3


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.txt", None, r"none\.txt: no such file or folder"),
        ("a.csv", b"x", r"a\.csv: name a \.txt or \.jsonl file"),
        ("a.txt", b"", r"a\.txt: holds no text"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}', r'a\.jsonl, line 2: write \{"text"'),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1"),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .* in whole characters"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=words):
        PERPLEXITY.settings(EvalConfig(perplexity_text=str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"evals\.perplexity_length = -1: use"):
        EvalConfig(perplexity_length=-1)


def test_a_run_on_a_named_text_equals_a_plain_forward_pass(run_dir, config):
    loaded = load_run(run_dir, device="cpu")
    loaded = replace(loaded, model=loaded.model.double())
    result = PERPLEXITY.run(loaded, config, False)
    found, held_out = result["on_text"], PERPLEXITY.run(loaded, replace(config, perplexity_text=None), False)
    assert {**held_out, "on_text": found} == result  # beside what it says without one
    size = sum(len(document.encode()) for document in DOCUMENTS)
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(document)] for document in DOCUMENTS]
    bits = sum(bits_of(loaded.model, row, LENGTH) for row in ids)
    assert found["model"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-9)
    assert (found["bytes"], found["documents"], found["length"]) == (size, len(DOCUMENTS), LENGTH)
    assert found["targets"] == sum(map(len, ids)) - len(ids)
    assert sum(part["tokens"] for part in found["by_position"]) == found["targets"]
    assert found["by_position"][-1]["to"] == 128  # rows of 96 tokens
    nats = sum(part["loss"] * part["tokens"] for part in found["by_position"])
    assert nats / math.log(2) == pytest.approx(bits, rel=1e-9)
    assert found["bigram"]["bits_per_byte"] < found["uniform"]["bits_per_byte"]
    assert found["uniform"]["loss"] == pytest.approx(math.log(tokenizer.vocab_size))
    assert PERPLEXITY.scalars(result)["eval/text/bits_per_byte"] == found["model"]["bits_per_byte"]
    assert PERPLEXITY.scalars(result)["eval/bits_per_byte"] == held_out["model"]["bits_per_byte"]


@pytest.mark.parametrize(
    "name, length, bos", [("llama", 700, "tokenizer"), ("gpt2", 0, "always"), ("mamba2", 0, "tokenizer")]
)
def test_a_peer_on_a_named_text_equals_transformers_logits(config, name, length, bos):
    subject = peer(name, bos=bos)
    found = PERPLEXITY.run(subject, replace(config, perplexity_length=length), False)["on_text"]
    expected = {"gpt2": 160, "mamba2": 2048}.get(name, length)  # positions that it has, or the usual rows
    size = sum(len(document.encode()) for document in DOCUMENTS)

    def logits(tokens):
        return subject.model.inner(tokens, use_cache=False).logits

    bits = sum(bits_of(logits, [256, *subject.tokenizer.encode(d)], expected) for d in DOCUMENTS)
    assert found["model"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert (found["length"], found["targets"], found["changed_documents"]) == (expected, size, 0)
    assert "bigram" not in found  # no training split


def test_batches_and_rows_do_not_change_the_bits_of_short_documents():
    documents = ["x" * count for count in (1, 30, 7, 199, 30)]
    model = RecurrentModel()
    expected = -sum(score.log_prob for score in Scorer(model, ByteTokenizer()).rolling(documents))
    for rows, length in ((64, 500), (2, 200), (1, 199)):
        result = score_text(Scorer(model, ByteTokenizer(), max_rows=rows), documents, length=length)
        assert result["model"]["loss"] * result["targets"] == pytest.approx(expected, rel=1e-9)
    cut = score_text(Scorer(model, ByteTokenizer()), documents, length=10)
    assert cut["model"]["loss"] * cut["targets"] != pytest.approx(expected, rel=1e-6)
    assert cut["targets"] == result["targets"] == sum(map(len, documents))


def test_a_tokenizer_that_loses_characters_is_told_of():
    class Lower(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    result = score_text(Scorer(RecurrentModel(), Lower()), ["abc", "Abc", "ABC"], length=16)
    assert (result["changed_documents"], result["bytes"]) == (2, 9)


# --- by length of context


def test_windows_have_the_same_bytes_for_every_tokenizer(run_dir, config):
    loaded = load_run(run_dir, device="cpu")
    found = [LENGTHS.run(subject, config, False)["on_text"] for subject in (loaded, peer())]
    same = ("bytes", "windows", "skipped", "text", "digest")
    assert [found[0][key] for key in same] == [found[1][key] for key in same]
    assert found[0]["skipped"] == [10**6]
    assert found[0]["targets"] < found[1]["targets"] == found[1]["bytes"]
    stretches = cut_stretches(DOCUMENTS, [16, 64], limit=3)
    assert stretches.size == found[0]["bytes"]
    for context, target in stretches.pairs:
        assert any(context + target in document for document in DOCUMENTS)
        assert (target[0].isspace(), context[-1].isspace()) == (True, False)  # a whole word begins it
        assert TARGET / 2 <= len(target) <= TARGET


def test_whitespace_before_a_target_without_words_is_counted_with_it():
    context, word = "a" * 16 * ROOM, "\N{GREEK SMALL LETTER PI}" * TARGET
    for window in (context[:-2] + " \n" + word, context + word):
        stretches = cut_stretches([window], [16], limit=1)
        windows, _ = encode_stretches(Scorer(RecurrentModel(), ByteTokenizer()), stretches)
        assert windows.scored.sum() == stretches.size == len(window[window.rfind("a") + 1 :].encode())


@pytest.mark.parametrize(
    "bos, longest, where", [("tokenizer", 64, "documents"), ("always", 700, "documents end to end")]
)
def test_each_length_of_a_named_text_equals_a_pass_from_scratch(config, bos, longest, where):
    subject = peer(bos=bos)
    result = LENGTHS.run(subject, replace(config, context_lengths=(16, longest)), False)["on_text"]
    stretches = cut_stretches(DOCUMENTS, [16, longest], limit=3)
    assert result["text"] == where
    for row in result["rows"]:
        nats = 0.0
        for context, target in stretches.pairs:
            before = [256] * (bos == "always") + subject.tokenizer.encode(context)[-row["length"] :]
            ids = torch.tensor([[*before, *subject.tokenizer.encode(target)]])
            with torch.no_grad():
                log_probs = subject.model.inner(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
            nats -= float(log_probs.gather(-1, ids[:, 1:, None])[0, len(before) - 1 :].sum())
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / stretches.size, rel=1e-5)
    assert [row["length"] for row in result["rows"]] == [16, longest]
    counted = sum(part["tokens"] for part in result["by_position"])
    assert counted == result["targets"] + result["windows"] * (longest - (bos == "tokenizer"))
    assert LENGTHS.scalars({"on_text": result}) == {
        f"context_length/text/{row['length']}": row["bits_per_byte"] for row in result["rows"]
    }


def test_lengths_that_a_model_or_a_text_has_no_room_for_are_left_out():
    small = peer("gpt2")  # 160 positions
    scorer = Scorer(small.model, small.tokenizer)
    stretches = cut_stretches(DOCUMENTS, [16, 64], limit=3)
    with pytest.raises(ValueError, match=r"evals\.context_lengths = \[16, 64\]: with the targets the model"):
        encode_stretches(scorer, stretches)
    most = max(len(target.encode()) for _, target in stretches.pairs)
    small.model.limit = 64 + most
    windows, lengths = encode_stretches(scorer, stretches)
    assert (lengths, windows.longest) == ([16, 64], 64)
    small.model.limit -= 1
    assert encode_stretches(scorer, stretches)[1] == [16]
    with pytest.raises(ValueError, match=rf"the shortest needs {ROOM} x 10000 \+ {TARGET}: use shorter"):
        cut_stretches(DOCUMENTS, [10_000], limit=3)


# --- as tasks


def test_any_model_is_scored_on_a_named_text_and_its_content_is_in_the_key(config, text, tmp_path):
    tasks = ("perplexity", "context_length")
    with pytest.raises(ValueError, match=r"perplexity scores a trained run .* evals\.perplexity_text$"):
        check_tasks(EvalConfig(tasks=tasks), run=False, name="peer")
    with pytest.raises(ValueError, match=r"decode scores a trained run .*context_length, .*\)$"):
        check_tasks(replace(config, tasks=("decode",)), run=False, name="peer")
    config = replace(config, tasks=tasks)
    records = evaluate_subject(peer(), config, tmp_path / "out", progress=False)
    page = write_model_report(tmp_path / "out", records).read_text()
    assert f"{records['perplexity']['result']['on_text']['model']['bits_per_byte']:.3f}" in page
    assert "nats per token and perplexity cannot" in page
    assert "Loss by length of context, named text" in page
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    again = evaluate_subject(
        peer(), replace(config, perplexity_text=str(moved)), tmp_path / "out", progress=False
    )
    assert again == records
    moved.write_text(moved.read_text().replace("short", "other"))
    for name in tasks:
        changed = get_task(name).settings(replace(config, perplexity_text=str(moved)))
        assert changed != get_task(name).settings(config)
        assert get_task(name).settings(replace(config, perplexity_text=None)).keys() < changed.keys()


def test_the_report_of_a_run_shows_both_texts(run_dir, config):
    from evals.evaluate import evaluate_run
    from evals.summary import write_summary

    config = replace(config, tasks=("perplexity", "context_length"), device="cpu")
    record = evaluate_run(run_dir, config, progress=False)["perplexity"]
    summary = write_summary(run_dir, {})
    assert summary["text/bits_per_byte"] == record["result"]["on_text"]["model"]["bits_per_byte"]
    assert summary["validation/bits_per_byte"] == record["result"]["model"]["bits_per_byte"]
    page = write_run_report(run_dir).read_text()
    assert page.index("Held-out text") < page.index("A named text")
    assert page.count("Loss by length of context") == 2
