"""Hugging Face tokenizers (tokenizer.json), with BOS and EOS known and no special token read out of text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["HuggingFaceCodec"]

# Usual names in the order they are looked for.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[BOS]", "[CLS]")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")
# A long document is encoded in parts, for the library takes a hundred bytes of memory per character. They
# begin at a space between words, where the usual pre-tokenizers cut as well: the ids are those of the whole.
PART = 2**18
BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
# Spaces, an accent composed and open, a ligature, capitals, scripts: what normalisers change.
PROBE = "\tdef F(x):\n\n        return  'y'\n \u00e9 e\u0301 \ufb01 \u4e2d \U0001f600\n"


class HuggingFaceCodec:
    """A tokenizer.json as `data_pipeline.tokenizer.Tokenizer` uses it; its attributes are described there.

    Special tokens written out in a document ("<|endoftext|>") are encoded as the plain text they are. Where
    the model itself has such a piece for BOS or EOS, the text is cut inside its name; should it come out even
    so (a normaliser made it), it is left out. Documents of megabytes are encoded in parts where a tokenizer
    loses nothing; one that does, as by a space before every text, takes them whole.
    """

    def __init__(self, data: bytes, name: str, bos_token: str | None, eos_token: str | None) -> None:
        """`data`: a tokenizer.json, or the `model` of another object. ValueError if it cannot serve."""
        # One thread: the pipeline works in as many processes as there are cores. Read at every call.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        text, bos, eos = _unwrapped(data, name)
        self._tokenizer = _plain_tokenizer(text, name)
        bos, eos = self._names(bos_token or bos, eos_token or eos, name)
        self.bos_id, self.eos_id = self._tokenizer.token_to_id(bos), self._tokenizer.token_to_id(eos)
        self._tokenizer.add_special_tokens([bos, eos])  # they are there: only marked, so that decoding knows
        self._name = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in (bos, eos)))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        fields = {"bos": bos, "eos": eos, "tokenizer": text}
        self.model = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        self.library = "tokenizers"
        self.lossless = self.decode(2 * self.encode(PROBE).tolist()) == 2 * PROBE

    def _names(self, bos: str | None, eos: str | None, name: str) -> tuple[str, str]:
        """BOS and EOS: the given ones, else usual ones, else the other."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        for key, token in (("bos_token", bos), ("eos_token", eos)):
            if token is not None and self._tokenizer.token_to_id(token) is None:
                raise ValueError(
                    f"data.tokenizer.{key} = {token!r} is no token of {name}: use one of its special tokens "
                    f"({', '.join(sorted(special)) or 'there are none'})"
                )
        bos = bos or next((token for token in BOS_NAMES if token in special), None)
        eos = eos or next((token for token in EOS_NAMES if token in special), None)
        if bos is None and eos is None:
            raise ValueError(
                f"{name} has no special token with a usual name: set data.tokenizer.eos_token to the one "
                f"that ends a document ({', '.join(sorted(special)) or 'it has none: add one'})"
            )
        return str(bos or eos), str(eos or bos)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, without BOS or EOS: int32 [n]."""
        parts = _parts(text) if len(text) > PART and self.lossless else [text]
        return np.array([id_ for part in parts for id_ in self._encode([part])[0]], np.int32)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_control(text, encoding.ids) for text, encoding in zip(texts, found)]

    def _without_control(self, text: str, ids: list[int]) -> list[int]:
        control = (self.bos_id, self.eos_id)
        if self.bos_id in ids or self.eos_id in ids:
            parts = self._tokenizer.encode_batch_fast(self._name.split(text), add_special_tokens=False)
            ids = [id_ for part in parts for id_ in part.ids if id_ not in control]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids inside the vocabulary; special tokens give nothing."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def vocabulary(self) -> str:
        """Each token as JSON would write it, a tab and its id."""
        tokens = (self._tokenizer.id_to_token(id_) or "" for id_ in range(self.vocab_size))
        return "".join(f"{json.dumps(token)[1:-1]}\t{id_}\n" for id_, token in enumerate(tokens))


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PART and (found := BETWEEN_WORDS.search(text, start + PART)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _unwrapped(data: bytes, name: str) -> tuple[str, str | None, str | None]:
    """The tokenizer.json, BOS and EOS."""
    try:
        value = json.loads(data)
        if value.keys() == {"bos", "eos", "tokenizer"}:
            return value["tokenizer"], value["bos"], value["eos"]
        return data.decode(), None, None
    except ValueError as error:
        raise ValueError(f"{name} is no tokenizer.json: {error}") from error


def _plain_tokenizer(text: str, name: str) -> Any:
    """The library's object, made a function of the text alone: no cutting, padding, chance or specials."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"{name} is no tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "special tokens as text": the opposite of what it sounds like
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
