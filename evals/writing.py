"""Text as it is written, token by token: whole characters only, and nothing that a stop string takes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evals.sampling import Sampling, draw
from evals.states import Ids, TextCodec

__all__ = ["Finish", "TextStream", "Writer", "Written"]

Finish = Literal["eos", "stop", "length"]

# What a decoder gives for bytes that are no character (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one.
_CHARACTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Written:
    """A continuation.

    Attributes:
        text: without the stop string that ended it, and without a character that was not finished.
        tokens: ids drawn, the one that ended it (EOS) left out.
        finish: it ended with "eos", before a "stop" string, or at the allowed "length".
        seconds: from the first token drawn to the last, beside the rows it was batched with.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    seconds: float


class TextStream:
    """Decodes tokens one after the other, at a cost per token that does not grow with the text.

    Tokens are kept until they end a character; the others are never decoded again. Of the text, what may be
    the start of a stop string is kept back.
    """

    def __init__(self, tokenizer: TextCodec, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest = max((len(text) for text in self._stop), default=0)
        self._open: Ids = []
        self._passed_on = 0  # characters of the open tokens' text
        self._text: list[str] = []
        self._tail = ""  # of the text: what a stop string could reach back into
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one token; returns the text that is now certain to stay."""
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        stop = len(text.rstrip(_REPLACEMENT)) if text.endswith(_REPLACEMENT) else len(text)
        decoded = self._close(text) if stop < len(text) else 0
        stop = max(stop, decoded)
        new, self._passed_on = text[self._passed_on : stop], stop - decoded
        if stop == len(text):
            self._open, self._passed_on = [], 0
        return self._settle(new)

    def _close(self, text: str) -> int:
        """Let go of open tokens that no later one changes, where there are many; the length of their text."""
        before, last = self._open[:-_CHARACTER_BYTES], self._open[-_CHARACTER_BYTES:]
        if not before:
            return 0
        part = self._tokenizer.decode(before)
        if part + self._tokenizer.decode(last) != text:  # a character lies across
            return 0
        self._open = last
        return len(part)

    def _settle(self, text: str) -> str:
        """Add decoded text; returns what of it, and of what was kept back, no stop string can take back."""
        self._tail += text
        places = [self._tail.find(stop) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._tail) - self._kept_back())

    def _kept_back(self) -> int:
        """Length of the longest end of the tail that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._tail)), 0, -1):
            if any(stop.startswith(self._tail[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int) -> str:
        released, self._tail = self._tail[:count], self._tail[count:]
        self._text.append(released)
        return released

    def end(self) -> str:
        """No token follows: what was kept back, without an unfinished character; nothing after a stop."""
        if self.stopped:
            return ""
        return self._release(len(self._tail))

    @property
    def text(self) -> str:
        """What was returned so far."""
        return "".join(self._text)


class Writer:
    """One row of a batch being decoded: reads the rest of its prompt, then what it draws itself.

    Attributes:
        next_token: what the model reads next.
        finish: how it ended; None while it goes on.
    """

    def __init__(
        self, tokenizer: TextCodec, rest: Ids, sampling: Sampling, generator: torch.Generator
    ) -> None:
        self._vocab_size, self._forced = tokenizer.vocab_size, rest[1:]
        self._ends = frozenset(getattr(tokenizer, "end_ids", ())) | {tokenizer.eos_id}
        self._sampling, self._generator = sampling, generator
        self._stream = TextStream(tokenizer, sampling.stop)
        self._ids: Ids = []
        self._began = self._ended = time.perf_counter()
        self.next_token = rest[0]
        self.finish: Finish | None = "length" if sampling.max_tokens < 1 else None

    def read(self, logits: Tensor) -> str:
        """Take the logits [V] after ``next_token`` and choose the next one; returns text that is certain."""
        if self.finish is not None:
            return ""
        if self._forced:
            self.next_token = self._forced.pop(0)
            self._began = time.perf_counter()
            return ""
        # A model may have more rows than the tokenizer has pieces; those stand for no text.
        self.next_token = draw(logits[: self._vocab_size], self._sampling, self._generator)
        self._ended = time.perf_counter()
        if self.next_token in self._ends:
            self.finish = "eos"
            return self._stream.end()
        self._ids.append(self.next_token)
        text = self._stream.add(self.next_token)
        if self._stream.stopped:
            self.finish = "stop"
        elif len(self._ids) >= self._sampling.max_tokens:
            text += self._stream.end()
            self.finish = "length"
        return text

    def written(self) -> Written:
        """The result; only of a row that has finished."""
        assert self.finish is not None, "this row is still being written"
        seconds = self._ended - self._began
        return Written(text=self._stream.text, tokens=tuple(self._ids), finish=self.finish, seconds=seconds)
