"""Decoding: time to the first token, tokens per second and bytes of state, beside attention with a cache.

    python -m benchmarks.decode            writes benchmarks/results/decode.json, 15 minutes on two cores
    python -m benchmarks.decode --show     its table, as a Markdown table

Two models of one configuration, every layer Trellis or every layer softmax attention with a key-value cache
(Transformer++), random weights. Steps of both are timed in turns, round by round, so that a machine that
slows down slows both. What a step costs depends on how much is in the state, not on what: a cache is filled
with random keys and values, and a batch of 16 continues 16 copies of one row's state. Reading is not
shortened: a time to the first token is there where the whole prompt was read, and a dash where reading it
would have gone beyond the limits in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from evals.scorer import select_rows
from evals.tasks.decode import filled_state, has_cache
from trellis_dist.files import read_json, write_json
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, LMState, build_language_model

RESULT = Path(__file__).parent / "results" / "decode.json"
LENGTHS = (1024, 4096, 16384, 65536, 131072)
BATCHES = (1, 16)
CHUNK = 1024
WARMUP, STEPS, READS = 3, 16, 3
KINDS = ("trellis", "attention")
# Share of the machine's memory that states of one case may take.
MEMORY_SHARE = 0.4


def model_config(kind: str) -> ModelConfig:
    """4 layers of width 512, 8 heads; Trellis with memories of 64 slots and chunks of 64 tokens."""
    trellis = TrellisConfig(slots=64, chunk_size=64)
    return ModelConfig(vocab_size=8192, num_layers=4, dim=512, num_heads=8, pattern=(kind,), trellis=trellis)


def build(kind: str, device: torch.device) -> LanguageModel:
    """A model with random weights, in bf16 on a GPU and fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return build_language_model(model_config(kind), seed=0, device=str(device), dtype=dtype).eval()


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def read_seconds(model: LanguageModel, *, batch: int, length: int, device: torch.device) -> float:
    """Seconds from a prompt of ``length`` tokens to the first token of each of ``batch`` rows."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(device)
    began, state = _clock(device), model.init_state(batch)
    for start in range(0, length, CHUNK):
        logits, state = model.prefill(tokens[:, start : start + CHUNK], state, last_only=True)
    logits.argmax(-1).cpu()
    return _clock(device) - began


def state_after(model: LanguageModel, length: int, *, batch: int, before: LMState | None) -> LMState:
    """The state of ``batch`` rows after ``length`` tokens: read on from ``before`` (one row), or filled."""
    if has_cache(model):
        return filled_state(model, length, batch=batch, room=WARMUP + STEPS)
    assert before is not None
    assert before.position == length
    return select_rows(before, [0] * batch)


@torch.no_grad()
def read_on(model: LanguageModel, state: LMState, length: int, device: torch.device) -> LMState:
    """Read random tokens until ``length``."""
    generator = torch.Generator().manual_seed(state.position)
    while state.position < length:
        count = min(CHUNK, length - state.position)
        tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
        _, state = model.prefill(tokens.to(device), state, last_only=True)
    return state


class _Stepper:
    """Decodes on from one state and keeps the seconds of each step."""

    def __init__(self, model: LanguageModel, state: LMState, batch: int, device: torch.device) -> None:
        self._model, self._state, self._device = model, state, device
        self._tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.seconds: list[float] = []

    def step(self) -> None:
        """One token of every row."""
        began = _clock(self._device)
        logits, self._state = self._model.decode_step(self._tokens, self._state)
        self._tokens = logits.argmax(-1)
        self.seconds.append(_clock(self._device) - began)

    def numbers(self, batch: int) -> dict[str, float]:
        """Tokens per second (median step, and the slowest and quickest quarter's edge), bytes of state."""
        steps = self.seconds[WARMUP:]
        low, middle, high = statistics.quantiles(steps, n=4)
        return {
            "tokens_per_second": batch / middle,
            "quartiles": [batch / high, batch / low],
            "ms_per_step": 1000 * middle,
            "state_bytes": self._state.bytes(),
        }


def _fits(length: int, batch: int, config: ModelConfig, device: torch.device) -> bool:
    """Whether a key-value cache of that size leaves the machine room."""
    itemsize = 2 if device.type == "cuda" else 4
    size = 2 * config.num_layers * config.dim * length * batch * itemsize
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return size < MEMORY_SHARE * memory


def measure_lengths(
    models: dict[str, LanguageModel],
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    limits: dict[str, int],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Every length and batch, both kinds in turns; ``limits``: prompt tokens in all that a kind reads."""
    rows: list[dict[str, Any]] = []
    read = models["trellis"].init_state(1)
    for length in lengths:
        read = read_on(models["trellis"], read, length, device)
        for batch in batches:
            rows += _case(models, read, length=length, batch=batch, limits=limits, device=device)
            print(json.dumps(rows[-2:]), flush=True)
    return rows


def _case(
    models: dict[str, LanguageModel],
    read: LMState,
    *,
    length: int,
    batch: int,
    limits: dict[str, int],
    device: torch.device,
) -> list[dict[str, Any]]:
    steppers = {
        kind: _Stepper(model, state_after(model, length, batch=batch, before=read), batch, device)
        for kind, model in models.items()
        if not has_cache(model) or _fits(length, batch, model.config, device)
    }
    with torch.no_grad():
        for _ in range(WARMUP + STEPS):
            for stepper in steppers.values():
                stepper.step()
    found = {kind: stepper.numbers(batch) for kind, stepper in steppers.items()}
    del steppers
    return [
        {
            "kind": kind,
            "length": length,
            "batch": batch,
            "first_token_s": _first_token(
                model, batch=batch, length=length, limit=limits[kind], device=device
            ),
            **found.get(kind, {"state": "does not fit this machine"}),
        }
        for kind, model in models.items()
    ]


def _first_token(
    model: LanguageModel, *, batch: int, length: int, limit: int, device: torch.device
) -> float | None:
    if batch * length > limit:
        return None
    repeats = READS if batch * length <= 16 * CHUNK else 1
    return statistics.median(
        read_seconds(model, batch=batch, length=length, device=device) for _ in range(repeats)
    )


def render(found: dict[str, Any]) -> str:
    """The table: one line per length and batch."""
    lines = [
        "| tokens before | rows | state: Trellis | state: attention | tokens/s: Trellis "
        "| tokens/s: attention | first token: Trellis | first token: attention |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cases = {(row["length"], row["batch"], row["kind"]): row for row in found["rows"]}
    for length, batch in sorted({(row["length"], row["batch"]) for row in found["rows"]}):
        pair = [cases[length, batch, kind] for kind in KINDS]
        cells = [f"{length:,}", str(batch)]
        cells += [_cell(row, "state_bytes", 2**20, " MiB") for row in pair]
        cells += [_cell(row, "tokens_per_second", 1, "") for row in pair]
        cells += [_cell(row, "first_token_s", 1, " s") for row in pair]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str, unit: float, suffix: str) -> str:
    value = row.get(name)
    return "-" if value is None else f"{value / unit:,.1f}{suffix}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the table of the last result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--read-limit", type=int, help="prompt tokens of a case, over all rows")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.show:
        print(render(read_json(options.output)))
        return
    device = torch.device(options.device)
    limits = _limits(device, options.read_limit)
    models = {kind: build(kind, device) for kind in KINDS}
    rows = measure_lengths(
        models,
        lengths=sorted(options.lengths),
        batches=options.batches,
        limits=limits,
        device=device,
    )
    result = {
        "machine": machine(),
        "versions": versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(next(models["trellis"].parameters()).dtype),
        "parameters": {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()},
        "model": "4 layers, dim 512, 8 heads; Trellis: 64 slots, chunks of 64",
        "read_limit_tokens": limits,
        "timed_steps": STEPS,
        "rows": rows,
    }
    write_json(options.output, result)
    print(render(result))


def _limits(device: torch.device, given: int | None) -> dict[str, int]:
    """A CPU reads 128K tokens through Trellis in minutes, and through attention in an hour."""
    if given is not None:
        return dict.fromkeys(KINDS, given)
    if device.type == "cuda":
        return dict.fromkeys(KINDS, 16 * LENGTHS[-1])
    return {"trellis": LENGTHS[-1], "attention": LENGTHS[2]}


if __name__ == "__main__":
    main()
