"""The tokenizer that transformers opens gives the ids of the data, whatever stands in a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import TokenizerConfig
from data_pipeline.huggingface import TrellisTokenizer
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from tests.data_pipeline.test_tokenizer import TEXTS, byte_level, opened

KINDS = ("bpe", "unigram", "tokenizer.json", "two specials")
TRAPS = [
    "<s>",
    "</s>",
    "<|endoftext|>",
    "a<s> b</s>c",
    "\u2581\u2581",
    "\0",
    " \n\t ",
    "caf\u00e9 e\u0301",
    "",
]


def trained(kind: str) -> Tokenizer:
    if kind in ("bpe", "unigram"):
        return Tokenizer(train_tokenizer(TokenizerConfig(vocab_size=400, threads=1, model_type=kind), TEXTS))
    special = ("<|endoftext|>",) if kind == "tokenizer.json" else ("<s>", "</s>", "<|pad|>")
    return opened(byte_level(special))


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TrellisTokenizer]:
    ours = trained(request.param)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(ours.model)
    return ours, TrellisTokenizer(str(path))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from([*TEXTS, *TRAPS])))
def test_ids_and_text_are_those_of_the_data(both, text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens_are_those_around_a_document(both) -> None:
    ours, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.eos_id,
    )
    bos, eos = theirs.bos_token, theirs.eos_token
    assert theirs.decode([ours.bos_id, *ours.encode("a b"), ours.eos_id]) == f"{bos}a b{eos}"
    assert theirs.get_special_tokens_mask([5, 6]) == [1, 0, 0]
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    pieces = theirs.convert_ids_to_tokens(ours.encode("the cat"))
    assert theirs.convert_tokens_to_ids(pieces) == ours.encode("the cat")
    assert theirs.convert_tokens_to_string(pieces) == "the cat"


def test_a_batch_is_padded_on_the_left(both) -> None:
    ours, theirs = both
    batch = theirs(["a", "the cat sat"], padding=True)
    short, long = batch["input_ids"]
    assert len(short) == len(long)
    assert short[-2:] == [ours.bos_id, *ours.encode("a")][-2:]
    assert batch["attention_mask"][0] == [0] * (len(long) - len(theirs("a")["input_ids"])) + [1] * len(
        theirs("a")["input_ids"]
    )


def test_saved_and_opened_again_it_is_the_same_tokenizer(both, tmp_path: Path) -> None:
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == ours.model
    again = TrellisTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:2], *TRAPS):
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "TrellisTokenizer"
    )


def test_an_id_that_no_piece_has_is_nothing(both) -> None:
    """A model with more rows than the tokenizer has pieces may write one."""
    ours, theirs = both
    beyond = [ours.vocab_size, ours.vocab_size + 70]
    ids = ours.encode("the cat")
    assert theirs.decode([*ids, *beyond]) == theirs.decode([beyond[0], *ids]) == "the cat"
    assert theirs.decode(beyond[0]) == ""
    tokens = theirs.convert_ids_to_tokens([*ids, *beyond])
    assert len({*tokens[-2:], *theirs.get_vocab()}) == len(theirs.get_vocab()) + 2
    assert theirs.convert_tokens_to_string(tokens) == "the cat"


def test_a_refused_special_token_changes_nothing(both) -> None:
    _, theirs = both
    before = (theirs.special_tokens_map, theirs.eos_token_id, len(theirs))
    piece = theirs.eos_token
    for refused in (
        {"pad_token": "<|new|>"},
        {"cls_token": piece, "mask_token": "<|new|>"},
        {"extra_special_tokens": [piece, "<|new|>"]},
    ):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            theirs.add_special_tokens(refused)
        assert (theirs.special_tokens_map, theirs.eos_token_id, len(theirs)) == before
    assert theirs.cls_token is None


def test_what_the_model_has_no_rows_for_is_refused(both) -> None:
    _, theirs = both
    with pytest.raises(ValueError, match="not in the vocabulary"):
        theirs.add_tokens(["<|new|>"])
    with pytest.raises(ValueError):
        theirs("\ud800")
