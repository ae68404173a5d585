"""What is scored: a model with its tokenizer, wherever the two came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.scorer import CausalLM, TextCodec

if TYPE_CHECKING:
    import torch

__all__ = ["Subject"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be scored.

    Attributes:
        name: for people: a run's name, or a model folder's.
        model: in evaluation mode.
        tokenizer: also says what starts a context (`evals.states.context_start`).
        digest: identifies the weights; part of a result's key.
        tokenizer_digest: identifies the tokenizer; part of a result's key.
        device: where the model is.
    """

    name: str
    model: CausalLM
    tokenizer: TextCodec
    digest: str
    tokenizer_digest: str
    device: torch.device
