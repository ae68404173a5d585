"""Decoding measured: state bytes and milliseconds per token by position, beside softmax attention.

The run's model is compared with one of the same configuration whose every layer is attention with a key-value
cache. Its weights are random and its cache is filled with random keys and values of the right size: reading
64K tokens through attention would take minutes and change neither the bytes nor the time of a step. A Trellis
model really reads its tokens; a model that has attention layers itself gets a filled cache too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from evals.config import EvalConfig
from evals.runs import resolve_device
from evals.tasks.protocol import Result, Task
from trellis_dist.models.kv_cache import KVCache
from trellis_dist.models.language_model import LanguageModel, LMState, build_language_model

if TYPE_CHECKING:
    from evals.runs import LoadedRun

__all__ = ["TASK", "filled_state", "has_cache", "measure", "states_at"]

WARMUP_STEPS, TIMED_STEPS = 4, 24
PREFILL_CHUNK = 1024
FILLED = "cache filled with random keys and values of the right size"
READ = "tokens really read"


def states_at(model: LanguageModel, positions: Sequence[int]) -> Iterator[LMState]:
    """One state of one row per (increasing) position."""
    if has_cache(model):
        yield from (filled_state(model, position, room=WARMUP_STEPS + TIMED_STEPS) for position in positions)
        return
    state = model.init_state(1)
    weights = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for position in positions:
        while state.position < position:
            count = min(PREFILL_CHUNK, position - state.position)
            tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
            _, state = model.prefill(tokens.to(weights.device), state, last_only=True)
        yield state


def has_cache(model: LanguageModel) -> bool:
    """Whether a layer keeps keys and values, so that the state grows, at most to the layer's window."""
    return any(isinstance(layer, KVCache) for layer in model.init_state(1).layers)


def filled_state(model: LanguageModel, position: int, *, batch: int = 1, room: int) -> LMState:
    """The first state of ``batch`` rows, with ``position`` random keys and values in every cache, or as many
    as its window holds.

    ``room`` is kept free for that many tokens.
    """
    state = model.init_state(batch)
    layers = []
    for layer in state.layers:
        if isinstance(layer, KVCache):
            keys = layer.keys_values()[0]
            count = position if layer.window is None else min(position, layer.window)
            shape = (keys.shape[0], keys.shape[1], count, keys.shape[3])
            layer = layer.reserve(count + room)
            layer = layer.append(keys.new_empty(shape).normal_(), keys.new_empty(shape).normal_())
            layer = replace(layer, position=position)
        layers.append(layer)
    return replace(state, layers=tuple(layers), position=position)


def measure(
    model: LanguageModel, positions: Sequence[int], *, progress: bool = False
) -> list[dict[str, Any]]:
    """Decode one row at each position.

    States of one size are all kept and stepped in turn, so that a machine that slows down for a while slows
    every position alike; of growing caches one is kept at a time, because it may be most of the memory.

    Returns:
        Per position: "position", "state_bytes" (after the timed steps), "ms_per_token" (their median).
    """
    if has_cache(model):
        bar = tqdm(positions, desc="decode, attention", disable=not progress)
        timed = [
            _timed_steps(model, [filled_state(model, position, room=WARMUP_STEPS + TIMED_STEPS)])[0]
            for position in bar
        ]
    else:
        states = states_at(model, positions)
        bar = tqdm(states, total=len(positions), desc="decode", disable=not progress)
        timed = _timed_steps(model, list(bar))
    return [
        {"position": position, "state_bytes": size, "ms_per_token": statistics.median(milliseconds)}
        for position, (milliseconds, size) in zip(positions, timed)
    ]


def _timed_steps(model: LanguageModel, states: list[LMState]) -> list[tuple[list[float], int]]:
    """Milliseconds of every timed step from each state, and the bytes of the state after them."""
    device = next(model.parameters()).device
    tokens = [torch.zeros(1, dtype=torch.long, device=device) for _ in states]
    milliseconds: list[list[float]] = [[] for _ in states]
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        for i, state in enumerate(states):
            start = time.perf_counter()
            logits, states[i] = model.decode_step(tokens[i], state)
            tokens[i] = logits.argmax(-1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            milliseconds[i].append(1000 * (time.perf_counter() - start))
    return [(times[WARMUP_STEPS:], state.bytes()) for times, state in zip(milliseconds, states)]


def _run(loaded: LoadedRun, config: EvalConfig, progress: bool) -> Result:
    model = loaded.model
    dtype = next(model.parameters()).dtype
    attention_config = replace(model.config, pattern=("attention",))
    attention = build_language_model(attention_config, seed=0, device=loaded.device, dtype=dtype).eval()
    positions = config.decode_positions
    return {
        "model": measure(model, positions, progress=progress),
        "attention": measure(attention, positions, progress=progress),
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "attention_parameters": sum(p.numel() for p in attention.parameters()),
        "model_method": FILLED if has_cache(model) else READ,
        "attention_method": FILLED,
        "rows": 1,
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "timed_steps": TIMED_STEPS,
    }


def _settings(config: EvalConfig) -> Mapping[str, Any]:
    return {"positions": list(config.decode_positions), "device": resolve_device(config.device)}


def _scalars(result: Result) -> dict[str, float]:
    last = result["model"][-1]
    return {f"decode/{name}": float(last[name]) for name in ("state_bytes", "ms_per_token")}


TASK = Task(name="decode", needs_run=True, settings=_settings, run=_run, scalars=_scalars)
