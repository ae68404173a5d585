"""SentencePiece: training, and models that give back exactly the text they were given."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizers_hf import PROBE

__all__ = ["SentencePieceCodec", "train_tokenizer"]

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# Characters per training sentence. SentencePiece never learns across sentences, so text is cut into long
# windows and not into lines: pieces may then hold newlines and whole indents (7% fewer tokens on code).
WINDOW = 4096
# SentencePiece stores a space as U+2581 and would give a real U+2581 back as a space; NUL ends its strings.
# Both go around it as byte pieces.
AROUND = re.compile("([\u2581\0])")
# No piece holds a space after another character, so text cut there encodes the same; and a long document is
# encoded several times as fast as in one piece, because BPE keeps a queue of all symbols of its text.
WORD_START = re.compile("(?<! ) ")


class SentencePieceCodec:
    """A serialised model as `data_pipeline.tokenizer.Tokenizer` uses it: ``decode(encode(text)) == text``."""

    lossless, library = True, "sentencepiece"

    def __init__(self, model: bytes, name: str) -> None:
        """ValueError (naming `name`) if `model` is none or cannot serve."""
        import sentencepiece

        self.model = model
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{name} has no BOS or no EOS piece: train it with both")
        self._byte_ids = {char: self._bytes_of(char, name) for char in "\u2581\0"}
        # Twice: a model that puts a space before every text cannot be given a text in parts.
        if self.decode(2 * self.encode(PROBE).tolist()) != 2 * PROBE:
            raise ValueError(
                f"{name} does not give text back as it was (spaces, newlines, capitals, accents): train it "
                "with identity normalisation, byte_fallback, remove_extra_whitespaces=False and "
                "add_dummy_prefix=False"
            )

    def _bytes_of(self, char: str, name: str) -> np.ndarray:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
        if self._processor.unk_id() in ids:
            raise ValueError(f"{name} has no byte pieces: train it with byte_fallback")
        return np.array(ids, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids, without BOS or EOS: int32 [n]."""
        # One call a window: the library starts threads for a list, also for a list of one.
        encode = self._processor.encode_as_numpy
        parts = [np.zeros(0, np.int32)]
        # To look first is ten times as fast as to split at once.
        around = any(char in text for char in self._byte_ids)
        for part in AROUND.split(text) if around else [text]:
            if part in self._byte_ids:
                parts.append(self._byte_ids[part])
            elif part:
                parts.extend(encode(window) for window in _word_windows(part))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def decode(self, ids: list[int]) -> str:
        """Text of ids inside the vocabulary; control tokens give nothing."""
        text: str = self._processor.decode(ids)
        return text

    def vocabulary(self) -> str:
        """Each piece (its newlines as "\\n"), a tab and its score."""
        pieces = (self._processor.id_to_piece(i).replace("\n", "\\n") for i in range(self.vocab_size))
        return "".join(f"{piece}\t{self._processor.get_score(i):g}\n" for i, piece in enumerate(pieces))


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    """Train a SentencePiece model on `texts`; the same texts and config give the same bytes.

    Args:
        config: vocabulary size, model type and threads.
        texts: documents; at most ``config.sample_bytes`` bytes of them (UTF-8) are used.

    Returns:
        The serialised .model file.

    Raises:
        ValueError: the vocabulary does not fit the text; the message says what to change.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_windows(texts, config.sample_bytes),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            num_threads=config.threads,
            split_by_unicode_script=config.split_by_script,
            normalization_rule_name="identity",
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=8 * WINDOW,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, StopIteration) as error:
        raise ValueError(
            f"data.tokenizer.vocab_size = {config.vocab_size} cannot be trained on this corpus "
            f"({str(error).rpartition('] ')[2] or 'no text'}): lower it or use more text"
        ) from error
    return model.getvalue()


def _word_windows(text: str) -> list[str]:
    """`text` in parts of about WINDOW characters that begin at a word, 16 times as long without one."""
    parts = []
    start = 0
    while len(text) - start > WINDOW:
        found = WORD_START.search(text, start + WINDOW, start + 16 * WINDOW)
        stop = found.start() if found else start + 16 * WINDOW
        parts.append(text[start:stop])
        start = stop
    parts.append(text[start:])
    return parts


def _windows(texts: Iterable[str], budget: int) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), WINDOW):
            window = text[start : start + WINDOW]
            yield window
            budget -= len(window.encode())
            if budget <= 0:
                return
