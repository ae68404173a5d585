"""Seconds per token of every model, in turns in one process: runs that share a machine cannot tell.

CPU seconds of one thread, or on a GPU seconds by the clock, in bf16 as models are trained there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from benchmarks.study.order import chosen
from benchmarks.study.plan import OURS, Settings, Task, model_keys, models, plan, registered, table
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import flops_per_token, parameter_counts, state_bytes
from trellis_dist.models.language_model import build_language_model

__all__ = ["measure", "step_of"]

WARM = 2
# Of a timed step: one row of the longest length.
STEP_TOKENS = 4096


def step_of(config: ModelConfig, *, length: int) -> Callable[[], float]:
    """A call makes one training step on 4,096 tokens and returns its seconds."""
    device = plan()["computes"]["device"]
    model = build_language_model(config, seed=0, device=device)
    if device == "cuda":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    shape = (max(STEP_TOKENS // length, 1), length)
    tokens, labels = (
        torch.randint(config.vocab_size, shape, generator=generator).to(device) for _ in range(2)
    )

    def step() -> float:
        start = _now()
        optimizer.zero_grad()
        (model.loss_sum(tokens, labels) / labels.numel()).backward()
        optimizer.step()
        return _now() - start

    return step


def _now() -> float:
    """CPU seconds of this process; on a GPU seconds, once it is done with what it was given."""
    if plan()["computes"]["counts"] == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    results: Mapping[str, Mapping[str, Any]], lengths: Sequence[int] = (1024, 4096), *, rounds: int = 12
) -> dict[str, Any]:
    """Median and spread (tenth to ninetieth percentile) of seconds per token, by length and model.

    With the chosen form of Trellis, once ``results`` say which that is.
    """
    torch.set_num_threads(plan()["computes"]["threads"])
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": rounds, "lengths": {}}
    settings = {name: Settings(name, 1e-3, table(name)) for name in models() if registered(name)}
    if (best := chosen(OURS, results)) is not None:
        settings[OURS] = best
    for length in lengths:
        task = {name: Task(name, "tune", own, length=length, tokens=10**6) for name, own in settings.items()}
        configs = {name: task[name].spec(Path("shards")).resolved.model for name in settings}
        steps = {name: step_of(config, length=length) for name, config in configs.items()}
        times = [{name: step() for name, step in steps.items()} for _ in range(WARM + rounds)][WARM:]
        tokens = max(STEP_TOKENS // length, 1) * length
        found["lengths"][str(length)] = {
            name: _row(configs[name], [one[name] / tokens for one in times], length)
            | {"set": list(model_keys(own.set))}
            for name, own in settings.items()
        }
    return found


def _row(config: ModelConfig, seconds: Sequence[float], length: int) -> dict[str, Any]:
    deciles = statistics.quantiles(seconds, n=10)
    return {
        "seconds_per_token": statistics.median(seconds),
        "low": deciles[0],
        "high": deciles[-1],
        "parameters": parameter_counts(config).total,
        "flops_per_token": flops_per_token(config, sequence_length=length),
        "state_bytes": state_bytes(config, position=length),
    }
