"""Log-likelihoods and generation from a model's carried state.

A prompt is read once, in pieces, into the model's state; every choice of a question, and every generated
token, continues from that state. For a Trellis model the state has one size, so memory does not grow with the
prompt. Prompts of unequal length share a batch: the batch is prefilled up to its shortest prompt. What is
left of the others is read behind pads where the model takes some (a Trellis does), so that each state is that
of a whole prompt but for its last token; else it is a longer ``rest``, which is read together with every
choice or forced during decoding.

On several ranks (evals/ranks.py) each batch is scored by one of them, and every rank gets all results. Which
prompts share a batch does not depend on the number of ranks, so neither do the numbers.

Shapes: B prompts, R rows (prompt x choice), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from evals.batching import cut, cut_rows
from evals.ranks import Ranks, current_ranks
from evals.sampling import Sampling, stream_names
from evals.states import (
    CausalLM,
    Ids,
    TextCodec,
    context_ids,
    context_start,
    map_tensors,
    select_rows,
    state_bytes,
)
from evals.writing import Writer, Written

T = TypeVar("T")

# Prompts of one batch differ by at most this many tokens: the rest of a prompt is read once per choice.
MAX_SPREAD = 32
# Tokens that are read in the time it takes to start a call and to fetch the weights, on a CPU and on a GPU.
CALL_OVERHEAD = (192, 2048)
# Continuations of a prompt, about: questions have two to four choices.
COPIES = 3
# Elements of the largest logits tensor, [tokens, V] at once (fp32: 128 MiB); a GPU has room for more.
LOGIT_BUDGET = 2**25
_GPU_BUDGETS = 8
# Tokens of one prefill call, over all rows: bounds the activations.
READ_BUDGET = 2**14
PREFILL_CHUNK = 512
# Pieces are cut to multiples of this, which the chunks of recurrent layers divide.
_PIECE = 64
# Bytes of the states of all rows of a batch; a key-value cache reaches it with few rows of a long prompt.
STATE_BUDGET = 2**31
# Lengths at which the bytes of a state are measured: a buffer that doubles has room for twice as many.
_MEASURED = (32, 96)

__all__ = [
    "LOGIT_BUDGET",
    "CausalLM",
    "Ids",
    "Prefix",
    "Score",
    "Scorer",
    "TextCodec",
    "map_tensors",
    "select_rows",
]


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
        state: the model's state after all of each prompt but its rest.
        rests: what is left of each prompt, at least one token.
        index: place of each prompt in the caller's list.
        names: of the random streams of the prompts (`evals.sampling.stream_names`).
        longest: tokens that were read of the longest prompt.
    """

    state: Any
    rests: list[Ids]
    index: list[int]
    names: list[str]
    longest: int


class Scorer:
    """Scores texts with one model; every method is deterministic and independent of how rows are batched.

    On several ranks every rank calls the same methods with the same arguments, and gets the same results.

    Args:
        model: the language model; its own device and dtype are used.
        tokenizer: says what starts a context: BOS, unless it is a peer's (evals/peer_codec.py).
        prefill_chunk: tokens per row and prefill call; bounds memory for any prompt length. None takes what
            the model asks for (its attribute ``prefill_chunk``), else 512.
        max_rows: rows decoded or scored together; fewer where their states would exceed the budget.
        state_budget: bytes of the states of one batch; None takes 2 GiB, or an eighth of a GPU's memory.
        ranks: None takes those of the process group, if there is one.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: TextCodec,
        *,
        prefill_chunk: int | None = None,
        max_rows: int = 64,
        state_budget: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        asked_for: int = getattr(model, "prefill_chunk", PREFILL_CHUNK)
        self.prefill_chunk = prefill_chunk or asked_for
        self.max_rows, self.ranks = max_rows, ranks or current_ranks()
        weights = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        self.device = weights.device if weights is not None else torch.device("cpu")
        self.state_budget = state_budget or _default_state_budget(self.device)
        elements = LOGIT_BUDGET * (_GPU_BUDGETS if self.device.type == "cuda" else 1)
        self._pads_within: int = getattr(model, "pads_within", 0)
        self._overhead = CALL_OVERHEAD[self.device.type == "cuda"]
        self._budget = max(elements // tokenizer.vocab_size, 1)

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Token ids of a context, begun as the codec has it, and of its continuation.

        Spaces at the end of the context move to the continuation, where training text has them. The two
        parts are tokenised separately, so all choices of a question share one context exactly; a codec with
        an ``encode_pair`` of its own sees to that itself.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if kept and hasattr(self.tokenizer, "encode_pair"):
            before, after = self.tokenizer.encode_pair(kept, continuation)
            return [*context_start(self.tokenizer, before), *before], after
        return context_ids(self.tokenizer, kept), self.tokenizer.encode(continuation)

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
        """Score of each whole text from its first token on, each on its own after an empty context."""
        start = context_start(self.tokenizer, [])
        return [
            scores[0]
            for scores in self.score([start] * len(texts), [[self.tokenizer.encode(t)] for t in texts])
        ]

    def score(self, contexts: Sequence[Ids], choices: Sequence[Sequence[Ids]]) -> list[list[Score]]:
        """Scores of ``choices[i]`` after ``contexts[i]`` (token ids, context non-empty)."""
        return self.each(contexts, lambda prefix: self.score_from(prefix, [choices[i] for i in prefix.index]))

    def each(self, prompts: Sequence[Ids], answer: Callable[[Prefix], Sequence[T]]) -> list[T]:
        """What ``answer`` gives for every prompt, in the order of ``prompts``, on every rank.

        Args:
            prompts: token ids, each at least one (`evals.states.context_ids`).
            answer: called with a batch of prompts that were read; returns a (pickleable) value for each of
                ``prefix.index``. On several ranks each batch is answered by one of them.

        Raises:
            EchoError: another rank failed (evals/ranks.py).
            RuntimeError: the ranks cut other batches, as they do where their memory or models differ.
        """
        batches = list(self._batches([len(prompt) for prompt in prompts]))
        names = stream_names(prompts)

        def piece(place: int) -> tuple[list[int], list[T]]:
            # With its prompts: another rank may have cut other batches.
            return batches[place], list(answer(self._prefill(prompts, names, batches[place])))

        answers = self.ranks.divide(
            len(batches),
            piece,
            costs=[len(batch) * max(len(prompts[i]) for i in batch) for batch in batches],
        )
        if sorted(i for batch, _ in answers for i in batch) != list(range(len(prompts))):
            raise RuntimeError(
                "the ranks cut the prompts into other batches, so some would be missing or scored twice: "
                "give every rank the same model, and GPUs of equal memory"
            )
        found = {i: value for batch, values in answers for i, value in zip(batch, values)}
        return [found[i] for i in range(len(prompts))]

    def prefixes(self, prompts: Sequence[Ids]) -> Iterator[Prefix]:
        """Prefill the prompts, batched with others of about their length; all of them on every rank."""
        names = stream_names(prompts)
        for index in self._batches([len(prompt) for prompt in prompts]):
            yield self._prefill(prompts, names, index)

    @torch.no_grad()
    def _prefill(self, prompts: Sequence[Ids], names: Sequence[str], index: list[int]) -> Prefix:
        chosen = [prompts[i] for i in index]
        counts = [len(prompt) - 1 for prompt in chosen]
        assert min(counts) >= 0, "a prompt has at least one token"
        if not self._pads_within:
            counts = [min(counts)] * len(counts)
        return Prefix(
            state=self._read_rows([prompt[:count] for prompt, count in zip(chosen, counts)]),
            rests=[prompt[count:] for prompt, count in zip(chosen, counts)],
            index=index,
            names=[names[i] for i in index],
            longest=max(counts),
        )

    def _read_rows(self, rows: Sequence[Ids]) -> Any:
        """The state after rows of unequal length: what all have evenly, what is left behind pads."""
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        once = min(self._pads_within, self.prefill_chunk, READ_BUDGET // len(rows))
        even = 0 if shortest < longest <= once else shortest
        tokens = torch.tensor([row[:even] for row in rows], dtype=torch.long, device=self.device)
        state = self.read(tokens, self.model.init_state(len(rows)))
        if even == longest:
            return state
        pads = [longest - len(row) for row in rows]
        ends = [[0] * pad + list(row[even:]) for row, pad in zip(rows, pads)]
        return self._read_behind(torch.tensor(ends, dtype=torch.long, device=self.device), state, pads)

    @torch.no_grad()
    def _read_behind(self, tokens: Tensor, state: Any, pads: Sequence[int]) -> Any:
        """The state after ``tokens`` [B, T], of which the first ``pads`` of each row are none."""
        return self.model.prefill(tokens, state, last_only=True, pads=pads)[1]  # type: ignore[call-arg]

    @torch.no_grad()
    def read(self, tokens: Tensor, state: Any) -> Any:
        """The state after ``tokens`` [B, T] (T may be 0), read in pieces that bound memory."""
        piece = max(min(self.prefill_chunk, READ_BUDGET // len(tokens)), 1)
        if piece > _PIECE:
            piece -= piece % _PIECE
        for start in range(0, tokens.shape[1], piece):
            _, state = self.model.prefill(tokens[:, start : start + piece], state, last_only=True)
        return state

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """ln P of every token but the first, given ``state`` and the tokens before it.

        Logits are made for as many tokens at a time as their budget allows.

        Args:
            tokens: [R, T + 1]; the first follows ``state``.

        Returns:
            Natural logarithms, fp32 (fp64 for an fp64 model), and whether each token was the most probable
            one: both [R, T].
        """
        log_probs, best = [], []
        piece = max(min(self.prefill_chunk, self._budget // len(tokens)), 1)
        for start in range(0, tokens.shape[1] - 1, piece):
            part = tokens[:, start : min(start + piece, tokens.shape[1] - 1)]
            logits, state = self._logits(part, state, last=start + piece >= tokens.shape[1] - 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            target = tokens[:, start + 1 : start + 1 + part.shape[1]]
            chosen = logits.gather(-1, target[..., None])[..., 0]
            log_probs.append(chosen - logits.logsumexp(-1))
            best.append(logits.argmax(-1) == target)
        return torch.cat(log_probs, 1), torch.cat(best, 1)

    def _logits(self, tokens: Tensor, state: Any, *, last: bool) -> tuple[Tensor, Any]:
        """Logits [R, T, V]; the state after the last tokens is not made where the model can leave it out."""
        if last and hasattr(self.model, "logits_after"):
            return self.model.logits_after(tokens, state), None
        return self.model.prefill(tokens, state)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of prompts that are read together, shortest first."""
        order = sorted(range(len(lengths)), key=lambda place: lengths[place])
        cheapest = cut_rows if self._pads_within else partial(cut, copies=COPIES)
        places = cheapest(
            [lengths[i] for i in order],
            most=self.row_limit,
            spread=MAX_SPREAD,
            overhead=2 * self._overhead,  # one call reads the prompts, one more is not full
        )
        for start, stop in pairwise(places):
            yield order[start:stop]

    def row_limit(self, tokens: int) -> int:
        """How many rows of so many tokens are kept together."""
        first, per_token = self._bytes_of_a_row
        rows = min(self.max_rows, int(self.state_budget / max(first + per_token * tokens, 1)))
        if getattr(self.model, "reads_again", False):  # all of it in one call, for every piece
            rows = min(rows, READ_BUDGET // max(tokens, 1))
        return max(1, rows)

    @cached_property
    @torch.no_grad()
    def _bytes_of_a_row(self) -> tuple[float, float]:
        """Bytes of one row's state: what it starts with and what a token adds (nothing for a Trellis)."""
        few, more = _MEASURED
        sizes = []
        for count in _MEASURED:
            tokens = torch.zeros(1, count, dtype=torch.long, device=self.device)
            sizes.append(state_bytes(self.read(tokens, self.model.init_state(1))))
        per_token = max(sizes[1] - sizes[0], 0) / (more - few)
        return sizes[0] - per_token * few, per_token

    def score_from(self, prefix: Prefix, choices: Sequence[Sequence[Ids]]) -> list[list[Score]]:
        """Scores of ``choices[b]`` after prompt b of ``prefix``; the state is replicated over the choices."""
        rows = [(b, c) for b, group in enumerate(choices) for c in range(len(group))]
        rows.sort(key=lambda bc: len(prefix.rests[bc[0]]) + len(choices[bc[0]][bc[1]]))
        result = [[Score(0.0, True, 0)] * len(group) for group in choices]
        limit = self.row_limit(prefix.longest + 1)
        lengths = [len(prefix.rests[b]) + len(choices[b][c]) for b, c in rows]
        places = cut_rows(lengths, most=lambda _: limit, budget=self._budget, overhead=self._overhead)
        for start, stop in pairwise(places):
            part = rows[start:stop]
            scores = self._score_rows(
                select_rows(prefix.state, [b for b, _ in part]),
                [prefix.rests[b] for b, _ in part],
                [list(choices[b][c]) for b, c in part],
            )
            for (b, c), score in zip(part, scores):
                result[b][c] = score
        return result

    def _score_rows(self, state: Any, rests: list[Ids], continuations: list[Ids]) -> list[Score]:
        """One right-padded pass; padding comes after every scored token of a causal model."""
        rows = [rest + continuation for rest, continuation in zip(rests, continuations)]
        width = max(len(row) for row in rows)
        if width < 2:  # nothing but empty continuations
            return [Score(0.0, True, 0)] * len(rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for r, row in enumerate(rows):
            tokens[r, : len(row)] = torch.tensor(row, dtype=torch.long)
        log_probs, best = (part.cpu() for part in self.log_probs(tokens.to(self.device), state))
        scores = []
        for r, (rest, continuation) in enumerate(zip(rests, continuations)):
            scored = slice(len(rest) - 1, len(rest) - 1 + len(continuation))
            total = float(log_probs[r, scored].double().sum())
            scores.append(Score(total, bool(best[r, scored].all()), len(continuation)))
        return scores

    def generate(self, prompts: Sequence[Ids], sampling: Sampling) -> list[str]:
        """A continuation of each prompt (token ids, as `evals.states.context_ids` makes them)."""
        return self.each(prompts, lambda prefix: self.generate_from(prefix, sampling))

    def generate_from(self, prefix: Prefix, sampling: Sampling) -> list[str]:
        """A continuation of each prompt of ``prefix``, without the stop string that ended it."""
        return [written.text for written in self.write_from(prefix, sampling)]

    @torch.no_grad()
    def write_from(
        self, prefix: Prefix, sampling: Sampling, on_text: Callable[[int, str], None] | None = None
    ) -> list[Written]:
        """A continuation of each prompt of ``prefix``.

        Args:
            on_text: called with a prompt's place in the caller's list and what was added to its text, as
                soon as that is certain to stay.
        """
        writers = [
            Writer(self.tokenizer, rest, sampling, sampling.generator(name))
            for rest, name in zip(prefix.rests, prefix.names)
        ]
        state, rows = prefix.state, list(range(len(writers)))
        while going := [row for row in rows if writers[row].finish is None]:
            if 2 * len(going) <= len(rows):  # stop decoding what has finished
                state, rows = select_rows(state, [rows.index(row) for row in going]), going
            tokens = torch.tensor([writers[row].next_token for row in rows], device=self.device)
            logits, state = self.model.decode_step(tokens, state)  # [B, V]
            for row, values in zip(rows, logits.float().cpu()):
                text = writers[row].read(values)
                if text and on_text is not None:
                    on_text(prefix.index[row], text)
        return [writer.written() for writer in writers]


def _default_state_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return STATE_BUDGET
    return max(STATE_BUDGET, int(torch.cuda.get_device_properties(device).total_memory) // 8)
