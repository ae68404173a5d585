"""What the forget gate of each layer is worth to a trained model: the loss with that gate held open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.figures.correlation import difference
from evals.figures.trace import held_open, trellis_mixers
from evals.runs import LoadedRun
from evals.scorer import Ids, Scorer

__all__ = ["losses_held_open", "losses_of"]

# Tokens whose losses are drawn together: neighbours are not independent.
BLOCK = 64


def losses_of(run: LoadedRun, ids: Ids) -> NDArray[np.float64]:
    """Losses in nats of every token of ``ids`` but the first, read as one context."""
    scorer = Scorer(run.model, run.tokenizer)
    row = torch.tensor([ids], device=run.device)
    log_probs, _ = scorer.log_probs(row, run.model.init_state(1))
    losses: NDArray[np.float64] = -log_probs[0].double().cpu().numpy()
    return losses


def losses_held_open(run: LoadedRun, ids: Ids) -> dict[str, dict[str, Any]]:
    """As it is ("none"), with beta = 1 in one layer ("layer 3"), and in all of them ("all").

    Of each "loss", nats per token, and "difference": by how much it is above the loss as it is, with a 95%
    bootstrap interval over blocks of 64 tokens (`correlation.difference`; None of fewer than three blocks).
    """
    layers = list(trellis_mixers(run.model))
    held: dict[str, Sequence[int]] = {"none": [], **{f"layer {layer}": [layer] for layer in layers}}
    losses = {}
    for name, chosen in {**held, "all": layers}.items():
        with held_open(run.model, chosen):
            losses[name] = losses_of(run, ids)
    return {
        name: {"loss": float(found.mean()), "difference": difference(_blocks(found), _blocks(losses["none"]))}
        for name, found in losses.items()
    }


def _blocks(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over whole blocks."""
    means: NDArray[np.float64] = losses[: len(losses) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
    return means
