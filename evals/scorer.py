"""Log-likelihoods and generation from a model's carried state.

A prompt is read once, in pieces, into the model's state; every choice of a question, and every generated
token, continues from that state. For a Trellis model the state has one size, so memory does not grow with the
prompt. Prompts of unequal length share a batch: the batch is prefilled up to its shortest prompt, and what is
left of each prompt (its ``rest``) is read together with the choices or forced during decoding.

Shapes: B prompts, R rows (prompt x choice), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from evals.sampling import Sampling, draw

Ids = list[int]

# Prompts of one batch differ by at most this many tokens: the rest of a prompt is read once per choice.
MAX_SPREAD = 32
# Elements of the largest logits tensor, [tokens, V] at once (fp32: 128 MiB).
LOGIT_BUDGET = 2**25

__all__ = ["CausalLM", "Prefix", "Score", "Scorer", "TextCodec", "map_tensors", "select_rows"]


class CausalLM(Protocol):
    """What is scored: `trellis_dist.models.language_model.LanguageModel` and anything shaped like it."""

    def init_state(self, batch: int) -> Any:
        """State before the first token."""

    def prefill(self, tokens: Tensor, state: Any, *, last_only: bool = False) -> tuple[Tensor, Any]:
        """tokens [B, T] -> logits [B, T, V], or the last token's [B, V] only, and the state after them."""

    def decode_step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """tokens [B] -> logits [B, V] and the state after them."""


class TextCodec(Protocol):
    """The part of `data_pipeline.tokenizer.Tokenizer` that scoring needs."""

    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> Ids:
        """Pieces of a text, without BOS and EOS."""

    def decode(self, ids: Ids) -> str:
        """Text of some pieces."""


@dataclass(frozen=True)
class Score:
    """ln P(continuation | context) in nats, whether every token was the most probable one, and how many."""

    log_prob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Prefix:
    """B prompts read up to the shortest one.

    Attributes:
        state: the model's state after ``shared`` tokens of each prompt.
        rests: what is left of each prompt, at least one token.
        index: place of each prompt in the caller's list.
    """

    state: Any
    rests: list[Ids]
    index: list[int]


def map_tensors(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of a state built of dataclasses, tuples, lists and mappings."""
    if isinstance(state, Tensor):
        return function(state)
    if is_dataclass(state) and not isinstance(state, type):
        changed = {f.name: map_tensors(getattr(state, f.name), function) for f in fields(state) if f.init}
        return replace(state, **changed)
    if isinstance(state, list | tuple):
        parts = [map_tensors(part, function) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if isinstance(state, dict):
        return {key: map_tensors(part, function) for key, part in state.items()}
    return state


def select_rows(state: Any, rows: Sequence[int]) -> Any:
    """The state whose row r continues row ``rows[r]`` of ``state``; rows may repeat.

    Every tensor of a state has its rows first; a field ``batch``, where there is one, counts them.
    """
    index = torch.tensor(list(rows), dtype=torch.long)
    chosen = map_tensors(state, lambda tensor: tensor.index_select(0, index.to(tensor.device)))
    return replace(chosen, batch=len(index)) if hasattr(chosen, "batch") else chosen


class Scorer:
    """Scores texts with one model; every method is deterministic and independent of how rows are batched.

    Args:
        model: the language model; its own device and dtype are used.
        tokenizer: BOS starts every context.
        prefill_chunk: tokens per prefill call; bounds memory for any prompt length.
        max_rows: rows decoded or scored together.
    """

    def __init__(
        self, model: CausalLM, tokenizer: TextCodec, *, prefill_chunk: int = 512, max_rows: int = 64
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefill_chunk, self.max_rows = prefill_chunk, max_rows
        weights = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        self.device = weights.device if weights is not None else torch.device("cpu")
        self._budget = max(LOGIT_BUDGET // tokenizer.vocab_size, 1)

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Token ids of [BOS] context and of its continuation.

        Spaces at the end of the context move to the continuation, where training text has them. The two
        parts are tokenised separately, so all choices of a question share one context exactly.
        """
        kept = context.rstrip()
        spaces = context[len(kept) :]
        ids = [self.tokenizer.bos_id, *(self.tokenizer.encode(kept) if kept else [])]
        return ids, self.tokenizer.encode(spaces + continuation)

    def log_likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        """Score of each (context, continuation); requests with one context share its prefilled state."""
        groups: dict[tuple[int, ...], list[tuple[int, Ids]]] = {}
        for place, (context, continuation) in enumerate(requests):
            before, after = self.encode_pair(context, continuation)
            groups.setdefault(tuple(before), []).append((place, after))
        scored = self.score([list(g) for g in groups], [[after for _, after in g] for g in groups.values()])
        result = [Score(0.0, True, 0)] * len(requests)
        for group, scores in zip(groups.values(), scored):
            for (place, _), score in zip(group, scores):
                result[place] = score
        return result

    def rolling(self, texts: Sequence[str]) -> list[Score]:
        """Score of each whole text from its first token on, each on its own after BOS."""
        bos = [self.tokenizer.bos_id]
        return [
            scores[0]
            for scores in self.score([bos] * len(texts), [[self.tokenizer.encode(t)] for t in texts])
        ]

    def score(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[Score]]:
        """Scores of ``choices[i]`` after ``contexts[i]`` (token ids, context non-empty)."""
        result: list[list[Score]] = [[] for _ in contexts]
        for prefix in self.prefixes(contexts):
            scored = self.score_from(prefix, [choices[i] for i in prefix.index])
            for i, scores in zip(prefix.index, scored):
                result[i] = scores
        return result

    @torch.no_grad()
    def prefixes(self, prompts: Sequence[Ids]) -> Iterator[Prefix]:
        """Prefill the prompts, batched with others of about their length."""
        for index in self._batches([len(p) for p in prompts]):
            shared = min(len(prompts[i]) for i in index) - 1
            assert shared >= 0, "a prompt has at least its BOS"
            state = self.model.init_state(len(index))
            tokens = torch.tensor([prompts[i][:shared] for i in index], dtype=torch.long, device=self.device)
            step = max(min(self.prefill_chunk, self._budget // len(index)), 1)
            for start in range(0, shared, step):
                _, state = self.model.prefill(tokens[:, start : start + step], state, last_only=True)
            yield Prefix(state, [prompts[i][shared:] for i in index], index)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of prompts that fit one batch, shortest first."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda place: lengths[place]):
            if batch and (len(batch) >= self.max_rows or lengths[i] - lengths[batch[0]] > MAX_SPREAD):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def score_from(self, prefix: Prefix, choices: Sequence[Sequence[Ids]]) -> list[list[Score]]:
        """Scores of ``choices[b]`` after prompt b of ``prefix``; the state is replicated over the choices."""
        rows = [(b, c) for b, group in enumerate(choices) for c in range(len(group))]
        rows.sort(key=lambda bc: len(prefix.rests[bc[0]]) + len(choices[bc[0]][bc[1]]))
        result = [[Score(0.0, True, 0)] * len(group) for group in choices]
        while rows:
            part = rows[: self._rows_that_fit(prefix, choices, rows)]
            rows = rows[len(part) :]
            scores = self._score_rows(
                select_rows(prefix.state, [b for b, _ in part]),
                [prefix.rests[b] for b, _ in part],
                [list(choices[b][c]) for b, c in part],
            )
            for (b, c), score in zip(part, scores):
                result[b][c] = score
        return result

    def _rows_that_fit(
        self, prefix: Prefix, choices: Sequence[Sequence[Ids]], rows: list[tuple[int, int]]
    ) -> int:
        """How many of the (length-sorted) rows fit the logit budget together; at least one."""
        count = 1
        for b, c in rows[1 : self.max_rows]:
            if (count + 1) * (len(prefix.rests[b]) + len(choices[b][c])) > self._budget:
                break
            count += 1
        return count

    def _score_rows(self, state: Any, rests: list[Ids], continuations: list[Ids]) -> list[Score]:
        """One right-padded pass; padding comes after every scored token of a causal model."""
        rows = [rest + continuation for rest, continuation in zip(rests, continuations)]
        width = max(len(row) for row in rows) - 1
        if width < 1:  # nothing but empty continuations
            return [Score(0.0, True, 0)] * len(rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            tokens[r, : len(row) - 1] = torch.tensor(row[:-1], dtype=torch.long)
        logits, _ = self.model.prefill(tokens.to(self.device), state)  # [R, T, V]
        return [
            _score(logits[r, len(rest) - 1 : len(rest) - 1 + len(continuation)], continuation)
            for r, (rest, continuation) in enumerate(zip(rests, continuations))
        ]

    def generate(self, prompts: Sequence[Ids], sampling: Sampling) -> list[str]:
        """A continuation of each prompt (token ids that start with BOS)."""
        result = [""] * len(prompts)
        for prefix in self.prefixes(prompts):
            for i, text in zip(prefix.index, self.generate_from(prefix, sampling)):
                result[i] = text
        return result

    @torch.no_grad()
    def generate_from(self, prefix: Prefix, sampling: Sampling) -> list[str]:
        """A continuation of each prompt of ``prefix``, without the stop string that ended it."""
        writers = [
            _Writer(self.tokenizer, rest, sampling, sampling.generator(place))
            for rest, place in zip(prefix.rests, prefix.index)
        ]
        state = prefix.state
        while not all(writer.done for writer in writers):
            tokens = torch.tensor([writer.next_token for writer in writers], device=self.device)
            logits, state = self.model.decode_step(tokens, state)  # [B, V]
            for writer, row in zip(writers, logits.float().cpu()):
                writer.read(row)
        return [writer.text() for writer in writers]


class _Writer:
    """One row of a batch being decoded: reads the rest of its prompt, then what it draws itself."""

    def __init__(
        self, tokenizer: TextCodec, rest: Ids, sampling: Sampling, generator: torch.Generator
    ) -> None:
        self._tokenizer, self._forced = tokenizer, rest[1:]
        self._sampling, self._generator = sampling, generator
        self._ids: Ids = []
        self.next_token = rest[0]
        self.done = sampling.max_tokens < 1

    def read(self, logits: Tensor) -> None:
        """Take the logits [V] after ``next_token`` and choose the next one."""
        if self.done:
            return
        if self._forced:
            self.next_token = self._forced.pop(0)
            return
        # A model may have more rows than the tokenizer has pieces; those stand for no text.
        logits = logits[: self._tokenizer.vocab_size]
        self.next_token = draw(logits, self._sampling, self._generator)
        if self.next_token == self._tokenizer.eos_id:
            self.done = True
            return
        self._ids.append(self.next_token)
        stopped = bool(self._sampling.stop) and self._stop_place() is not None
        self.done = stopped or len(self._ids) >= self._sampling.max_tokens

    def _stop_place(self) -> int | None:
        text = self._tokenizer.decode(self._ids)
        places = [text.find(stop) for stop in self._sampling.stop]
        return min((place for place in places if place >= 0), default=None)

    def text(self) -> str:
        """What was written, cut before the first stop string."""
        return self._tokenizer.decode(self._ids)[: self._stop_place()]


def _score(logits: Tensor, continuation: Ids) -> Score:
    """logits [n, V] that predict the n tokens of a continuation."""
    if not continuation:
        return Score(0.0, True, 0)
    target = torch.tensor(continuation, device=logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
    return Score(float(log_probs), bool((logits.argmax(-1) == target).all()), len(continuation))
