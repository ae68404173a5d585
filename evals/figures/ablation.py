"""What the forget gate of each layer is worth to a trained model: the loss with that gate held open."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.figures.trace import held_open, trellis_mixers
from evals.runs import LoadedRun
from evals.scorer import Ids, Scorer

__all__ = ["loss_of", "losses_held_open"]


def loss_of(run: LoadedRun, ids: Ids) -> float:
    """Mean loss in nats of every token of ``ids`` but the first, read as one context."""
    scorer = Scorer(run.model, run.tokenizer)
    row = torch.tensor([ids], device=run.device)
    log_probs, _ = scorer.log_probs(row, run.model.init_state(1))
    return -float(log_probs.double().mean())


def losses_held_open(run: LoadedRun, ids: Ids) -> dict[str, float]:
    """The loss as it is ("none"), with beta = 1 in one layer ("layer 3"), and in all of them ("all")."""
    layers = list(trellis_mixers(run.model))
    held: dict[str, Sequence[int]] = {"none": [], **{f"layer {layer}": [layer] for layer in layers}}
    found = {}
    for name, chosen in {**held, "all": layers}.items():
        with held_open(run.model, chosen):
            found[name] = loss_of(run, ids)
    return found
