"""Associative recall (MQAR): which update and readout of Trellis can look up what they read once.

    python -m benchmarks.recall            writes benchmarks/results/recall.json, some 5 minutes on one core

A row is n pairs (key, value), the keys distinct, then the same pairs in another order; after a repeated key
the model must name its value. Chance is 1/64. Small and short: it tells models that recall from those that do
not, and ranks nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, versions
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model

RESULT = Path(__file__).parent / "results" / "recall.json"
KEYS = VALUES = 64
PAIRS = (4, 8, 16)
ROWS, TEST_ROWS, LEARNING_RATE = 64, 256, 3e-3

MIXERS: dict[str, dict[str, Any]] = {
    "stale, silu, ln_silu (the default)": {},
    "corrected, tanh, silu_rms": {
        "update": "corrected",
        "phi": "tanh",
        "readout": "silu_rms",
        "step_bound": "token",
        "step_size_max": 1.0,
    },
}


def model_config(mixer: dict[str, Any]) -> ModelConfig:
    """2 layers of width 64, 2 heads with memories of 32 slots, chunks of 16 tokens."""
    trellis = TrellisConfig(slots=32, chunk_size=16, **mixer)
    return ModelConfig(vocab_size=KEYS + VALUES, num_layers=2, dim=64, num_heads=2, trellis=trellis)


def batch(rows: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels [rows, 4 pairs]; -100 everywhere but at the repeated keys."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (rows, pairs), generator=generator)
    again = torch.rand(rows, pairs, generator=generator).argsort(1)
    stated = torch.stack([keys, values], -1)
    asked = stated.gather(1, again[..., None].expand(-1, -1, 2))
    labels = torch.stack([asked[..., 1], torch.full_like(again, -100)], -1)
    ignored = torch.full((rows, 2 * pairs), -100)
    return torch.cat([stated, asked], 1).flatten(1), torch.cat([ignored, labels.flatten(1)], 1)


def train(config: ModelConfig, *, seed: int, steps: int) -> LanguageModel:
    """AdamW with a cosine schedule; every step has rows of one number of pairs, in turn."""
    model = build_language_model(config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    for step in range(steps):
        tokens, labels = batch(ROWS, PAIRS[step % len(PAIRS)], generator)
        loss = model.loss_sum(tokens, labels) / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: LanguageModel, pairs: int) -> float:
    """Share of repeated keys whose value is the most probable token, on rows not trained on."""
    tokens, labels = batch(TEST_ROWS, pairs, torch.Generator().manual_seed(0))
    asked = labels != -100
    return float((model(tokens).argmax(-1) == labels)[asked].double().mean())


def measure(mixer: dict[str, Any], *, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Accuracy by number of pairs, for each seed and their mean, and CPU seconds of one training."""
    start, runs = time.process_time(), []
    for seed in seeds:
        model = train(model_config(mixer), seed=seed, steps=steps)
        runs.append({str(pairs): round(accuracy(model, pairs), 3) for pairs in PAIRS})
    mean = {name: round(statistics.mean(run[name] for run in runs), 3) for name in runs[0]}
    seconds = round((time.process_time() - start) / len(seeds), 1)
    return {"accuracy": mean, "accuracy_by_seed": runs, "cpu_seconds_each": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every mixer and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "steps": options.steps}
    found |= {"rows_per_step": ROWS, "learning_rate": LEARNING_RATE, "seeds": options.seeds, "mixers": {}}
    for name, mixer in MIXERS.items():
        result = measure(mixer, seeds=options.seeds, steps=options.steps)
        found["mixers"][name] = {**mixer, **result}
        print(f"{name}: accuracy at {', '.join(f'{n} pairs {a:.2f}' for n, a in result['accuracy'].items())}")
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
