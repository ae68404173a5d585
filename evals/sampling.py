"""How the next token is chosen from logits."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trellis_dist.validation import require

__all__ = ["Sampling", "draw", "stream_names"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one generation.

    Attributes:
        max_tokens: tokens written at most.
        temperature: 0 is greedy.
        top_p: draw among the most probable tokens that together hold this mass.
        stop: writing ends before the first of these strings.
        seed: a prompt draws from (seed, its tokens), whatever it is batched with; of equal prompts in one
            call, each draws from a stream of its own.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens >= 0, f"max_tokens = {self.max_tokens}: use 0 or more tokens")
        require(self.temperature >= 0, f"temperature = {self.temperature}: use 0 (greedy) or more")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}: use a share in (0, 1]")
        require("" not in self.stop, "stop holds an empty string: it would end every text at once")

    def generator(self, name: str) -> torch.Generator:
        """The random stream of the prompt of that name (`stream_names`)."""
        hashed = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(hashed[:7], "big"))


def stream_names(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A name for each prompt: of its tokens, and of how many equal ones came before it."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        name = hashlib.sha256(array("q", prompt).tobytes()).hexdigest()
        names.append(f"{name}/{seen[name]}")
        seen[name] += 1
    return names


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [V] (CPU)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(descending=True, stable=True)
        # The token that crosses the mass stays, so at least one does.
        keep = ordered.cumsum(-1) - ordered < sampling.top_p
        return int(index[torch.multinomial(ordered * keep, 1, generator=generator)])
    return int(torch.multinomial(probs, 1, generator=generator))
