"""Tokenizers: text to token ids and back, by SentencePiece or by a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipeline.tokenizers_sp import SentencePieceCodec, train_tokenizer

__all__ = ["VERSION", "Tokenizer", "train_tokenizer"]

# Part of the content address: raise it when the ids of a text change with the same tokenizer file.
VERSION = 1


class _Codec(Protocol):
    """What a kind of tokenizer does; the attributes are those of `Tokenizer`."""

    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    lossless: bool
    library: str

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: list[int]) -> str: ...
    def vocabulary(self) -> str: ...


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        model: what a data set stores as its tokenizer.model, and `load` reads: a SentencePiece model as it
            is, a tokenizer.json together with the names of BOS and EOS.
        sha256: hash of `model`, which is the tokenizer's identity.
        vocab_size: ids lie below it; byte pieces and control tokens included.
        library: the package that does the work.
        bos_id, eos_id: ids put around a stored document, possibly the same; `encode` never returns them.
        lossless: ``decode(encode(text)) == text``: for all text UTF-8 can hold with SentencePiece, which is
            refused otherwise; for a probe of spaces, accents and compatible letters with a tokenizer.json.
    """

    def __init__(
        self,
        model: bytes,
        name: str = "tokenizer",
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        """Open a SentencePiece model, a tokenizer.json, or what `model` was.

        Args:
            model: the file's bytes.
            name: what messages call it.
            bos_token, eos_token: for a tokenizer.json (data.tokenizer.bos_token, eos_token); None finds the
                usual names among its special tokens, and takes the one there is for both.

        Raises:
            ValueError: it is none of these, or cannot serve; the message says what to do.
        """
        self._codec = _codec(model, name, bos_token, eos_token)
        self.model = self._codec.model
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self.vocab_size, self.lossless = self._codec.vocab_size, self._codec.lossless
        self.library = self._codec.library
        self.bos_id, self.eos_id = self._codec.bos_id, self._codec.eos_id

    @classmethod
    def load(cls, path: Path | str, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
        """Read a file. Raises FileNotFoundError, or ValueError naming a file that cannot be used."""
        return cls(Path(path).read_bytes(), str(path), bos_token=bos_token, eos_token=eos_token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS. Raises ValueError for a lone surrogate."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as int32 [n], which costs a seventh less where a corpus is encoded."""
        text.encode()
        return self._codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens give nothing. Raises ValueError for an id outside the vocabulary."""
        ids = [int(id_) for id_ in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}): got {min(ids)} to {max(ids)}")
        return self._codec.decode(ids)

    def vocabulary(self) -> str:
        """The .vocab file, for people: each piece, a tab and its score (SentencePiece) or id."""
        return self._codec.vocabulary()


def _codec(model: bytes, name: str, bos_token: str | None, eos_token: str | None) -> _Codec:
    if model.lstrip().startswith(b"{"):  # a SentencePiece model begins with a protobuf tag
        from data_pipeline.tokenizers_hf import HuggingFaceCodec

        return HuggingFaceCodec(model, name, bos_token, eos_token)
    if bos_token or eos_token:
        key = "data.tokenizer.bos_token" if bos_token else "data.tokenizer.eos_token"
        raise ValueError(f"{key} is for a tokenizer.json, and {name} is none: leave it out")
    return SentencePieceCodec(model, name)
