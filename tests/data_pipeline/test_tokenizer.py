from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import tokenizers_hf, tokenizers_sp
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
    assert len(text) > 8 * tokenizers_sp.WINDOW
    assert tokenizer.encode(text) == tokenizer._codec._processor.encode(text)


@given(data=st.data())
def test_cutting_at_words_loses_nothing(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet=" a\n", max_size=200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_sp, "WINDOW", data.draw(st.integers(1, 20)))
        parts = tokenizers_sp._word_windows(text)
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


EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}


@pytest.mark.parametrize(
    "changed",
    [
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nfkc_cf"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": True},
    ],
    ids=str,
)
def test_a_lossy_model_is_refused(changed: dict[str, object]) -> None:
    assert Tokenizer(sentencepiece_model(**EXACT), "exact").lossless
    with pytest.raises(ValueError, match="lossy does not give text back as it was"):
        Tokenizer(sentencepiece_model(**{**EXACT, **changed}), "lossy")


def sentencepiece_model(**options: object) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"\[0, 400\): got 3 to 400"):
        tokenizer.decode([3, 400])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")


def byte_level(
    special: tuple[str, ...] = ("<|endoftext|>",), *, prefix: bool = False, dropout: float | None = None
):
    """A byte-level BPE of 400 tokens, as in GPT-2."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE(dropout=dropout))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS + ["<|endoftext|> </s>"] * 50, trainer)
    return library


def opened(library: object, **tokens: str) -> Tokenizer:
    return Tokenizer(library.to_str(pretty=True).encode(), "tokenizer.json", **tokens)


@pytest.fixture(scope="module")
def hugging_face() -> Tokenizer:
    return opened(byte_level())


@given(
    text=st.one_of(
        st.text(),
        st.text(alphabet=string.printable),
        st.lists(st.sampled_from(["<|endoftext|>", "<|end", "oftext|>", " ", "a", "\n"])).map("".join),
    )
)
def test_every_text_comes_back_from_a_byte_level_tokenizer(hugging_face: Tokenizer, text: str) -> None:
    assert hugging_face.lossless
    ids = hugging_face.encode(text)
    assert hugging_face.decode(ids) == text
    assert hugging_face.eos_id not in ids
    assert hugging_face.encode("") == []


def test_hugging_face_ids_are_the_librarys(hugging_face: Tokenizer) -> None:
    library = byte_level()
    for text in TEXTS:
        assert hugging_face.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert hugging_face.vocab_size == 400
    assert hugging_face.bos_id == hugging_face.eos_id == library.token_to_id("<|endoftext|>")
    assert (
        hugging_face.vocabulary().splitlines()[hugging_face.eos_id] == f"<|endoftext|>\t{hugging_face.eos_id}"
    )
    assert len(hugging_face.vocabulary().splitlines()) == 400


def test_a_stored_tokenizer_json_is_the_same_tokenizer(hugging_face: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(hugging_face.model)
    stored = Tokenizer.load(tmp_path / "tokenizer.model")
    assert stored.model == hugging_face.model
    assert stored.sha256 == hugging_face.sha256 == hashlib.sha256(stored.model).hexdigest()
    assert (stored.bos_id, stored.eos_id) == (hugging_face.bos_id, hugging_face.eos_id)
    assert stored.encode(TEXTS[0]) == hugging_face.encode(TEXTS[0])
    assert json.loads(stored.model)["tokenizer"] == byte_level().to_str(pretty=True)


def test_bos_and_eos_are_part_of_the_identity(tmp_path: Path) -> None:
    library = byte_level(("<|endoftext|>", "<one>", "<two>"))
    path = tmp_path / "tokenizer.json"
    path.write_text(library.to_str())
    usual, one, both = (
        Tokenizer.load(path),
        Tokenizer.load(path, eos_token="<one>"),
        Tokenizer.load(path, "<two>", "<one>"),
    )
    assert usual.bos_id == usual.eos_id == library.token_to_id("<|endoftext|>")
    assert one.bos_id == one.eos_id == library.token_to_id("<one>")
    assert (both.bos_id, both.eos_id) == (library.token_to_id("<two>"), library.token_to_id("<one>"))
    assert len({usual.sha256, one.sha256, both.sha256}) == 3
    assert Tokenizer(both.model).bos_id == both.bos_id
    assert Tokenizer(both.model, eos_token="<two>").eos_id == both.bos_id


@pytest.mark.parametrize(
    "special, bos, eos",
    [
        (("<s>", "</s>", "<unk>"), "<s>", "</s>"),
        (("<|end_of_text|>", "<|begin_of_text|>"), "<|begin_of_text|>", "<|end_of_text|>"),
        (("[PAD]", "[CLS]", "[SEP]"), "[CLS]", "[SEP]"),
        (("<s>", "<pad>"), "<s>", "<s>"),
        (("<pad>", "</s>"), "</s>", "</s>"),
    ],
)
def test_usual_names_are_found(special: tuple[str, ...], bos: str, eos: str) -> None:
    library = byte_level(special)
    tokenizer = opened(library)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.token_to_id(bos), library.token_to_id(eos))
    for name in special:
        assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]) == "x"


def test_without_usual_names_the_key_is_named() -> None:
    library = byte_level(("<stop>",))
    with pytest.raises(ValueError, match=r"set data\.tokenizer\.eos_token to the one that ends .*\(<stop>\)"):
        opened(library)
    assert opened(library, eos_token="<stop>").bos_id == library.token_to_id("<stop>")
    with pytest.raises(
        ValueError, match=r"data\.tokenizer\.bos_token = '<x>' is no token of tokenizer\.json.*<stop>"
    ):
        opened(library, bos_token="<x>")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.eos_token.*it has none"):
        opened(byte_level(()))


def test_a_token_that_is_not_marked_special_ends_no_document() -> None:
    library = byte_level(())
    library.add_tokens(["<stop>", "  "])
    tokenizer = opened(library, eos_token="<stop>")
    ids = tokenizer.encode("a<stop>b  c")
    assert tokenizer.eos_id not in ids
    assert library.token_to_id("  ") in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<stop>b  c"


def test_a_piece_of_the_model_ends_no_document() -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), *((char, -5.0) for char in "ab</s>")]
    library = Library(models.Unigram(pieces, unk_id=0))
    library.decoder = decoders.Fuse()
    assert 1 in library.encode("a</s>b").ids
    tokenizer = opened(library, bos_token="<s>", eos_token="</s>")
    for text in ("a</s>b", "<s><s></s>", "</</s>s>"):
        assert not {1, 2} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not tokenizer.lossless
    library.normalizer = normalizers.Lowercase()
    assert 1 in library.encode("a</S>b").ids
    assert opened(library, eos_token="</s>").encode("a</S>b") == library.encode("ab").ids


def test_a_long_document_is_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    library, text = byte_level(), "".join(TEXTS[:4])
    whole, after = library.encode(text).ids, library.encode("after it").ids
    monkeypatch.setattr(tokenizers_hf, "PART", 100)
    parts = list(tokenizers_hf._parts(text))
    assert len(parts) > 10
    assert "".join(parts) == text
    assert [opened(library).encode(part) for part in (text, "after it")] == [whole, after]
    monkeypatch.setattr(
        tokenizers_hf, "_parts", None
    )  # one that puts a space before every text takes it whole
    prefixed = byte_level(prefix=True)
    assert opened(prefixed).encode(text) == prefixed.encode(text).ids


def test_a_lossy_tokenizer_json_says_so() -> None:
    from tokenizers import normalizers

    assert not opened(byte_level(prefix=True)).lossless
    for normalizer in (normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()):
        library = byte_level()
        library.normalizer = normalizer
        assert not opened(library).lossless


def test_ids_depend_on_nothing_but_the_text() -> None:
    library = byte_level(dropout=0.5)
    library.enable_truncation(4)
    library.enable_padding(length=9, pad_token="<|endoftext|>")
    tokenizer = opened(library)
    ids = [tokenizer.encode(text) for text in [TEXTS[0], "ab"] * 10]
    assert ids == [tokenizer.encode(TEXTS[0]), tokenizer.encode("ab")] * 10
    assert tokenizer.decode(ids[0]) == TEXTS[0]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_ids_with_gaps_lie_below_the_vocabularys_size() -> None:
    value = json.loads(byte_level().to_str())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 499, "content": "</s>"})
    value["model"]["vocab"]["</s>"] = 499
    tokenizer = Tokenizer(json.dumps(value).encode())
    assert tokenizer.vocab_size == 500
    assert tokenizer.eos_id == 499
    assert tokenizer.decode([450]) == ""
    with pytest.raises(ValueError, match=r"\[0, 500\): got 500"):
        tokenizer.decode([500])


@pytest.mark.parametrize(
    "content", [b"{", b'{"model": 1}', b'{"bos": "a", "eos": "b", "tokenizer": "x"}', b'{"\xff"}']
)
def test_json_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer\.json: "):
        Tokenizer.load(tmp_path / "t.json")


def test_names_for_a_sentencepiece_model_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer\.eos_token is for a tokenizer\.json"):
        Tokenizer(tokenizer.model, eos_token="</s>")


def test_batches_and_losslessness_of_sentencepiece(tokenizer: Tokenizer) -> None:
    assert tokenizer.lossless
    for text in TEXTS[:3]:
        assert tokenizer.encode_array(text).dtype == "int32"
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)
    assert Tokenizer(tokenizer.model).sha256 == hashlib.sha256(tokenizer.model).hexdigest()


def test_a_lone_surrogate_is_refused_everywhere(hugging_face: Tokenizer) -> None:
    for call in (hugging_face.encode, hugging_face.encode_array):
        with pytest.raises(ValueError, match="surrogates"):
            call("\ud800")
