"""A tokenizer of `transformers`, or a tokenizer.json of ours, as the scorer uses tokenizers.

Some of these tokenizers put a space before every text, and take one from the start of what they decode. A
continuation is neither encoded nor decoded as if it began a text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer
    from evals.config import PeerBos
    from evals.states import TextCodec

__all__ = ["NativeCodec", "PeerCodec", "codec_of"]

# Ordinary text: what follows it is decoded as a continuation.
_BEFORE = "a"


class _InText(ABC):
    """Encodes and decodes what stands in a text, by what a tokenizer does with whole texts."""

    def _look(self) -> None:
        """Find out what the tokenizer puts before a text; called when `_ids` and `_text` work."""
        self._before = self._ids(_BEFORE)
        self._before_text = len(self._text(self._before))
        after = self._ids(f"b {_BEFORE}")[len(self._ids("b")) :]
        # The space before every text then stands for the one that the continuation begins with.
        self._has_own_space = after == self._before != self._ids(f" {_BEFORE}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, or of a continuation that begins with a space."""
        return self._ids(text[1:] if self._has_own_space and text.startswith(" ") else text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a text and of what follows it: what the ids of the whole have more than those of the text.

        As lm-evaluation-harness has it: where the two would merge into one token, that token is cut.
        """
        before, whole = self._ids(context), self._ids(context + continuation)
        return before, whole[len(before) :] or self.encode(continuation)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that follow other text; special tokens give nothing."""
        return self._text([*self._before, *ids])[self._before_text :]

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Ids of a whole text."""

    @abstractmethod
    def _text(self, ids: Sequence[int]) -> str:
        """Text of the ids of a whole text."""


class PeerCodec(_InText):
    """Text to token ids and back, without special tokens.

    Attributes:
        bos_id: starts an empty context; of a tokenizer without BOS its EOS, as in lm-evaluation-harness.
        eos_id: ends a text.
        end_ids: everything that ends a text, ``eos_id`` among it.
        vocab_size: ids lie below it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end_ids: Sequence[int] = (),
        bos: PeerBos = "tokenizer",
        name: str = "the tokenizer",
    ) -> None:
        """Wrap a tokenizer.

        Args:
            end_ids: what the model's generation settings end a text with.
            bos: what starts a context that is not empty: "always" BOS, or what the "tokenizer" puts before a
                text by itself, which may be nothing (as lm-evaluation-harness has it).
            name: of the model, for messages.

        Raises:
            ValueError: neither BOS nor EOS is known, or what the tokenizer adds cannot be told.
        """
        self._tokenizer = tokenizer
        ends = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *end_ids]
        known = tokenizer.bos_token_id
        if known is None and not ends:
            raise ValueError(
                f"{name} has neither a BOS nor an EOS token: name one in its special_tokens_map.json"
            )
        self.bos_id = int(ends[0] if known is None else known)
        self.eos_id = int(ends[0] if ends else self.bos_id)
        self.end_ids = frozenset(ends or [self.bos_id])
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        self._look()
        self._start = [self.bos_id] if bos == "always" else self._added(name)

    def start(self, ids: Sequence[int]) -> list[int]:
        """What is read before ``ids`` where they begin a context.

        An empty context is BOS; one that begins with BOS already, written out in its text, gets nothing.
        """
        if not ids:
            return [self.bos_id]
        return [] if ids[0] == self.bos_id else self._start

    def _added(self, name: str) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain = self._before
        whole = self._tokenizer.encode(_BEFORE, verbose=False)
        for place in range(len(whole) - len(plain) + 1):
            if whole[place : place + len(plain)] == plain:
                return list(whole[:place])
        raise ValueError(
            f"{name} encodes a text in another way when it adds special tokens, so what it puts before one "
            'cannot be told: set evals.peer_bos = "always"'
        )

    def _ids(self, text: str) -> list[int]:
        # verbose: it would warn of a text longer than the model was trained with.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class NativeCodec(_InText):
    """A tokenizer.json that does not give every text back as it was: one that puts a space before it, say.

    Attributes:
        bos_id, eos_id, vocab_size: as `data_pipeline.tokenizer.Tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self._look()

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def codec_of(tokenizer: Tokenizer) -> TextCodec:
    """One of ours for the scorer: as it is where texts can be encoded and decoded in parts."""
    return tokenizer if tokenizer.lossless else NativeCodec(tokenizer)
