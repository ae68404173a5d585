"""Associative recall with 4 to 128 pairs: small models, equally large, on the same rows.

Rows are those of ``evals.mqar`` with as few tokens as hold the pairs, 4 per pair and at least 32: the pairs,
then their keys again among fillers, near ones the likelier. Chance is 1 / keys.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from benchmarks.study.books import BASE
from benchmarks.study.plan import Settings, plan
from evals.mqar import Pieces, Rows, make_rows
from launch.experiments.equal import equal_width
from launch.experiments.runs import assignments
from launch.recipe import load_recipe
from trellis_dist.files import digest
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import parameter_counts, state_bytes
from trellis_dist.models.language_model import LanguageModel, build_language_model

__all__ = ["accuracy", "mark", "measure", "model_config", "rows_of", "train"]

# Rows 0 to 255 are the test; the next as many choose between learning rates.
TEST_ROWS = 256
# Rows of training are counted from here on: those of the test come first.
FIRST_ROW = 1_000_000


def model_config(settings: Settings) -> ModelConfig:
    """The small model with the layers of ``settings``, of the size of the paper's Trellis."""
    wanted = parameter_counts(_config({})).total
    own = {key: value for key, value in settings.set.items() if key.startswith("model.")}
    width = equal_width(_config(own), parameters=wanted)
    return _config(own | {"model.mlp_hidden": width})


def _config(own: Mapping[str, Any]) -> ModelConfig:
    options = plan()["recall"]
    return dataclasses.replace(
        load_recipe(str(BASE), assignments(own)).model,
        num_layers=options["layers"],
        dim=options["dim"],
        num_heads=options["heads"],
        vocab_size=1 + 2 * options["keys"],
    )


def mark(settings: Settings, *, seed: int) -> str:
    """A digest of what fixes the result: the model, how it is trained, and what it is asked."""
    config = dataclasses.asdict(model_config(settings))
    options = {key: plan()["recall"][key] for key in ("pairs", "keys", "steps", "tokens_per_step")}
    asked = {"test_rows": TEST_ROWS, "first_row": FIRST_ROW}
    return digest({"model": config, "rate": settings.rate, "seed": seed, **options, **asked})


@cache
def _pieces() -> Pieces:
    keys = plan()["recall"]["keys"]
    return Pieces(tuple(range(1, keys + 1)), tuple(range(keys + 1, 2 * keys + 1)), filler=0)


def rows_of(pairs: int, first: int, count: int, *, seed: int = 0) -> Rows:
    """Rows ``first``, ``first`` + 1, ... with so many pairs; each is a function of its number."""
    length = max(4 * pairs, 32)
    indices = range(first, first + count)
    return make_rows(_pieces(), start=(), pairs=pairs, length=length, indices=indices, seed=seed)


def train(config: ModelConfig, *, rate: float, seed: int, steps: int, tokens: int) -> LanguageModel:
    """AdamW with a cosine schedule; every step has rows of one number of pairs, in turn."""
    device = plan()["computes"]["device"]
    model = build_language_model(config, seed=seed, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, pairs in zip(range(steps), itertools.cycle(plan()["recall"]["pairs"])):
        count = max(tokens // max(4 * pairs, 32), 1)
        rows = rows_of(pairs, FIRST_ROW + step * tokens, count, seed=seed)
        labels = rows.labels().to(device)
        loss = model.loss_sum(rows.tokens.to(device), labels) / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: LanguageModel, pairs: int, *, begin: int = 0) -> float:
    """Share of the repeated keys whose value is the most probable piece, on 256 rows not trained on."""
    found, device = 0, plan()["computes"]["device"]
    for first in range(begin, begin + TEST_ROWS, 32):
        rows = rows_of(pairs, first, 32)
        said = model(rows.tokens.to(device)).argmax(-1).cpu()
        found += int((said.gather(1, rows.asked) == rows.answers).sum())
    return found / (TEST_ROWS * pairs)


def measure(settings: Settings, *, seed: int) -> dict[str, Any]:
    """Train and score: accuracy by number of pairs on test rows and on rows to choose by; size; digest."""
    options, config = plan()["recall"], model_config(settings)
    torch.set_num_threads(plan()["computes"]["threads"])
    model = train(
        config, rate=settings.rate, seed=seed, steps=options["steps"], tokens=options["tokens_per_step"]
    )
    choosing = [accuracy(model, pairs, begin=TEST_ROWS) for pairs in options["pairs"]]
    return {
        "digest": mark(settings, seed=seed),
        "choosing": round(sum(choosing) / len(choosing), 4),
        "parameters": parameter_counts(config).total,
        "state_bytes": state_bytes(config, position=4 * max(options["pairs"])),
        "accuracy": {str(pairs): round(accuracy(model, pairs), 4) for pairs in options["pairs"]},
    }
