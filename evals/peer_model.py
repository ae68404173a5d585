"""A causal language model of `transformers` behind the protocol of the scorer.

How far a model's cache can be trusted differs: some recurrent ones forget it when they read several tokens
after it (Mamba in transformers 5), some keep their state in the module, some return none. A model is asked
when it is wrapped: a short text is read in parts, by rows, and twice from one state, and must come out as
when it is read at once. What fails is not used.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evals.peer_cache import PeerState, copied
from evals.ranks import current_ranks
from evals.states import Ids, select_rows

__all__ = ["PeerModel", "PeerWarning", "Trust", "find_trust"]

# What a cache continues: pieces of text, single tokens only, or nothing.
Trust = Literal["pieces", "steps", "nothing"]

# Of the arguments of `forward`: where a model takes the cache that it returned under the same name.
_CACHES = ("past_key_values", "cache_params", "state", "mems")
# Tables of learned positions: no token beyond their end can be read.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_emb\w*)$")
# A text of so many tokens is read again rather than continued token by token.
_READ_AGAIN = 4096
_PIECE, _LONG_PIECE = 512, 2048
_NOTES = {
    "steps": "its cache continues single tokens only (several give other numbers): a text that is continued "
    "by more is read again, which is slower",
    "nothing": "it returns no cache that continues its text: every token reads the whole text again, which "
    "is slow",
}


class PeerWarning(UserWarning):
    """A model is scored in a slower way than others."""


class PeerModel(nn.Module):
    """A causal language model of `transformers` behind `evals.states.CausalLM`.

    Attributes:
        trust: what its cache continues.
        prefill_chunk: tokens of a prompt to read at a time, which the scorer asks for.
        reads_again: a continued text may be read as a whole, so that its tokens count, not those added.
        limit: tokens that it can read, where a table of learned positions ends; None where there is none.
        positions: tokens that it was made to read, by its configuration; None where that does not say.
    """

    def __init__(self, model: nn.Module, *, name: str = "the model", trust: Trust | None = None) -> None:
        """Wrap ``model`` (in evaluation mode); ``trust`` None finds out, and warns of what it lacks."""
        super().__init__()
        self.inner: Any = model
        self.name = name
        self._arguments = inspect.signature(model.forward).parameters
        self._cache_name = ""
        self.limit = _position_limit(model)
        self.positions = _positions(self.inner.config, self.limit)
        self.trust: Trust = trust or "pieces"
        if trust is None:
            self.trust = find_trust(self)
            if self.trust in _NOTES and current_ranks().is_main:
                warnings.warn(f"{name}: {_NOTES[self.trust]}", PeerWarning, stacklevel=3)
        self.reads_again = self.trust != "pieces"
        self.prefill_chunk = _PIECE if self.trust == "pieces" else _LONG_PIECE

    def init_state(self, batch: int) -> PeerState:
        """State before the first token."""
        history = None
        if self.trust != "pieces":
            history = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        return PeerState(batch, 0, None, history)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.inner.parameters()).device
        return device

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, state: PeerState, *, last_only: bool = False
    ) -> tuple[Tensor, PeerState]:
        """tokens [B, T] -> logits [B, T, V], or the last token's [B, V] only, and the state after them.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        count = tokens.shape[1]
        self._check_length(state.length + count)
        if state.history is not None and state.length and (count > 1 or self.trust == "nothing"):
            return self._again(tokens, state, last_only=last_only)
        logits, cache = self._call(
            tokens, copied(state.cache, batch=state.batch), keep=1 if last_only else count
        )
        return logits[:, -1] if last_only else logits, self._after(tokens, state, cache)

    def decode_step(self, tokens: Tensor, state: PeerState) -> tuple[Tensor, PeerState]:
        """tokens [B] -> logits [B, V] and the state after them."""
        return self.prefill(tokens[:, None], state, last_only=True)

    def _again(self, tokens: Tensor, state: PeerState, *, last_only: bool) -> tuple[Tensor, PeerState]:
        """Tokens that the cache does not continue: read the whole text, or long ones token by token."""
        history, count = state.history, tokens.shape[1]
        assert history is not None, "kept where it may be needed"
        if self.trust == "steps" and state.length + count > _READ_AGAIN:
            steps = []
            for column in tokens.T:
                logits, state = self.decode_step(column, state)
                steps.append(logits)
            return steps[-1] if last_only else torch.stack(steps, 1), state
        whole = torch.cat([history, tokens], 1)
        logits, cache = self._call(whole, None, keep=1 if last_only else count)
        return logits[:, -1] if last_only else logits, self._after(tokens, state, cache)

    def _after(self, tokens: Tensor, state: PeerState, cache: Any) -> PeerState:
        history = state.history
        if history is not None:
            history = torch.cat([history, tokens], 1)
        cache = None if self.trust == "nothing" else cache
        return replace(state, length=state.length + tokens.shape[1], cache=cache, history=history)

    def _call(self, tokens: Tensor, cache: Any, *, keep: int) -> tuple[Tensor, Any]:
        """Logits [B, keep, V] of the last ``keep`` tokens, and the cache after them."""
        given: dict[str, Any] = (
            {"use_cache": self.trust != "nothing"} if "use_cache" in self._arguments else {}
        )
        if cache is not None:
            given[self._cache_name] = cache
        if keep < tokens.shape[1] and "logits_to_keep" in self._arguments:
            given["logits_to_keep"] = keep
        output = self.inner(input_ids=tokens, **given)
        found = {name: output.get(name) for name in _CACHES if name in self._arguments}
        self._cache_name = next((name for name, value in found.items() if value is not None), "")
        return output.logits[:, -keep:], found.get(self._cache_name)

    def _check_length(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit:
            raise ValueError(
                f"{self.name} has {self.limit} positions and cannot read {tokens} tokens: use shorter texts"
            )


def _position_limit(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions can read; None: it computes them."""
    limits = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name)
    ]
    return min(limits, default=None)


def _positions(config: Any, limit: int | None) -> int | None:
    """Tokens that a model was made to read."""
    stated = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    found = [count for count in (stated, limit) if count]
    return min(found, default=None)


# Tokens of the text that a model is asked with, and how many of them are read first.
_ASKED, _FIRST, _STEPS = 24, 11, 4
# Largest error that is rounding, in standard deviations of the logits: by the device, and in 16 bits.
_ROUNDING = {"cpu": 1e-4, "cuda": 3e-3}
_ROUNDING_16 = 0.1


# A model of no more weights is asked in fp32, where rounding hides nothing: 2 GB more than in 16 bits.
_WIDENED = 1_000_000_000


@contextmanager
def _in_fp32(model: nn.Module) -> Iterator[None]:
    """Weights of 16 bits as fp32 while the block runs, and then as they were."""
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    if sum(tensor.numel() for tensor in narrow) > _WIDENED:
        narrow = []
    dtypes = [tensor.dtype for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(narrow, dtypes):
            tensor.data = tensor.data.to(dtype)


@torch.no_grad()
def find_trust(peer: PeerModel) -> Trust:
    """What the cache of a model continues: whatever gives the logits of reading all at once.

    Weights of 16 bits, up to a billion of them, are fp32 meanwhile, which takes at most 2 GB more. A larger
    model is asked as it is, in no more memory: a logit may then be off by a tenth of a standard deviation
    (the median over the tokens). In either case it may be off by a third of what forgetting the state would
    make: a model whose state counts for less than rounding is not trusted, and scored in the slower way.
    """
    with _in_fp32(peer.inner):
        return _find_trust(peer)


def _find_trust(peer: PeerModel) -> Trust:
    before, peer.trust = peer.trust, "nothing"
    try:
        question = _Question(peer)
        peer.trust = "pieces"  # so that the model is asked for its cache and given it
        if not question.continues(_STEPS * [1]):
            return "nothing"
        return (
            "pieces" if question.continues([_ASKED - _FIRST]) and question.continues([6, 1, 3]) else "steps"
        )
    finally:
        peer.trust = before


class _Question:
    """A text, what a model that trusts no cache makes of it, and how much of that is rounding."""

    def __init__(self, peer: PeerModel) -> None:
        config = peer.inner.config.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(0)
        self._peer, self._half = peer, peer.inner.dtype in (torch.bfloat16, torch.float16)
        self._tokens = torch.randint(int(config.vocab_size), (2, _ASKED), generator=generator)
        self._tokens = self._tokens.to(peer.device)
        self._whole = peer.prefill(self._tokens, peer.init_state(2))[0].double()
        floor = _ROUNDING_16 if self._half else _ROUNDING.get(peer.device.type, _ROUNDING["cuda"])
        swapped, _ = peer.prefill(self._tokens[[1, 0], : _ASKED - 4], peer.init_state(2))
        forgetful, _ = peer.prefill(self._tokens[:, _FIRST:], peer.init_state(2))
        forgotten = self._error(forgetful, [0, 1], _FIRST)
        self._allowed = min(max(floor, 10 * self._error(swapped, [1, 0], 0)), forgotten / 3)

    def continues(self, pieces: Ids) -> bool:
        """Whether these pieces give the same logits from one state, from rows of it, and from it again."""
        _, state = self._peer.prefill(self._tokens[:, :_FIRST], self._peer.init_state(2))
        if state.cache is None:
            return False
        for rows in ([0, 1], [1, 0, 1], [0, 1]):
            try:
                chosen = state if len(rows) == 2 else select_rows(state, rows)
                if not self._same(pieces, chosen, rows):
                    return False
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError):
                return False  # it cannot take its own cache back
        return True

    def _same(self, pieces: Ids, state: PeerState, rows: Ids) -> bool:
        parts = []
        for count in pieces:
            start = state.length
            logits, state = self._peer.prefill(self._tokens[rows, start : start + count], state)
            parts.append(logits)
        return self._error(torch.cat(parts, 1), rows, _FIRST) <= self._allowed

    def _error(self, logits: Tensor, rows: Ids, start: int) -> float:
        """In standard deviations of the logits. In 16 bits the median over tokens.

        Rounding may send a token to another expert, but a state that is wrong is wrong for all tokens.
        """
        expected = self._whole[rows, start : start + logits.shape[1]]
        errors = (logits.double() - expected).abs().amax(-1) / self._whole.std()
        return float(errors.median() if self._half else errors.max())
