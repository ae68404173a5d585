from __future__ import annotations

import argparse
import inspect
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import tokenizer as tokenizer_module
from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from tests.data_pipeline.texts import prose

CONFIG = TokenizerConfig(vocab_size=400, threads=1)
TEXTS = [prose(seed) for seed in range(20)]
# What SentencePiece treats specially: its space, its control and byte pieces, its unknown surface, marks.
SPECIAL = "\u2581\0 \n\t\r<s>/0xE2unk\u2047\ufffd\ufeff\u0301"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    config = TokenizerConfig(vocab_size=400, threads=1, model_type=request.param)
    return Tokenizer(train_tokenizer(config, TEXTS))


@given(text=st.one_of(st.text(), st.text(alphabet=SPECIAL), st.text(alphabet=string.printable)))
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_training_is_deterministic() -> None:
    config = TokenizerConfig(vocab_size=400)
    assert config.threads > 1
    model = train_tokenizer(config, TEXTS)
    assert model == train_tokenizer(config, iter(TEXTS))
    assert Tokenizer(model).vocab_size == 400


def test_pieces_hold_indents_and_newlines() -> None:
    code = inspect.getsource(argparse)
    tokenizer = Tokenizer(train_tokenizer(TokenizerConfig(vocab_size=600, threads=1), [code]))
    pieces = {tokenizer.decode([piece]) for piece in range(tokenizer.vocab_size)}
    assert {"        ", ":\n", "\n\n"} <= pieces
    assert len(tokenizer.encode("        return:\n\n")) <= 4


def test_the_sample_is_cut_at_its_size() -> None:
    config = TokenizerConfig(vocab_size=300, threads=1, sample_bytes=3000)
    assert train_tokenizer(config, TEXTS) == train_tokenizer(config, [*TEXTS[:5], "x" * 10**6])


def test_a_long_document_encodes_as_in_one_piece(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS)
    assert len(text) > 8 * tokenizer_module.WINDOW
    assert tokenizer.encode(text) == tokenizer._processor.encode(text)


@given(data=st.data())
def test_cutting_at_words_loses_nothing(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet=" a\n", max_size=200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "WINDOW", data.draw(st.integers(1, 20)))
        parts = tokenizer_module._word_windows(text)
    assert "".join(parts) == text


@pytest.mark.parametrize("texts", [["abc " * 3], []], ids=["tiny", "none"])
def test_a_vocabulary_too_large_for_the_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"vocab_size = 400 cannot be trained.*lower it or use more text"):
        train_tokenizer(CONFIG, texts)


def test_a_file_that_is_no_model_is_named(tmp_path) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model is not a SentencePiece model"):
        Tokenizer.load(path)


def test_a_lossy_model_is_refused(tmp_path) -> None:
    import io

    import sentencepiece

    lossy = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=lossy, vocab_size=400, byte_fallback=True, minloglevel=2
    )
    with pytest.raises(ValueError, match="does not give back tabs, newlines and spaces"):
        Tokenizer(lossy.getvalue(), "lossy")


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"\[0, 400\): got 3 to 400"):
        tokenizer.decode([3, 400])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")
