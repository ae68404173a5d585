"""The closing summary of a start, read from the run folder, so that a launcher can say it of a crash."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.commit import list_steps
from trellis_dist.training.console import short_time
from trellis_dist.training.metrics import read_rows
from trellis_dist.training.starts import StartRecord, read_starts, useful_seconds

__all__ = ["Closing", "close_run"]

MOST_STEPS = 6  # saved steps that are listed


@dataclasses.dataclass(frozen=True)
class Closing:
    """The summary as lines for a person and as facts (JSON types) for a program."""

    text: str
    facts: Mapping[str, Any]


def close_run(
    run_dir: Path,
    *,
    outcome: str,
    steps: int,
    tokens_per_step: int,
    error: str = "",
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Closing:
    """Sum up the run in ``run_dir`` after its newest start.

    Args:
        outcome: "finished", "stopped", "terminated" or "failed".
        steps, tokens_per_step: of the recipe.
        error: why it failed.
        rows: of ``metrics.jsonl``, where they were read before.
    """
    starts = read_starts(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl") if rows is None else rows
    facts = _facts(run_dir, starts, rows, tokens_per_step=tokens_per_step)
    facts |= {"outcome": outcome, "steps": steps} | ({"error": error} if error else {})
    lines = [
        f"{outcome}: step {facts['step']:,} of {steps:,}, {facts['tokens']:,} tokens",
        *_time_lines(facts),
        *_loss_lines(facts),
        _checkpoint_line(run_dir, facts["checkpoints"]),
        f"  report: {run_dir / 'training.html'}",
        _next_line(run_dir, outcome, newest=max(facts["checkpoints"], default=0), error=error),
    ]
    return Closing("\n".join(lines), facts)


def _facts(
    run_dir: Path, starts: Sequence[StartRecord], rows: Sequence[Mapping[str, Any]], *, tokens_per_step: int
) -> dict[str, Any]:
    saved = sorted(list_steps(run_dir / "checkpoints"))
    step = max([starts[-1].step] if starts else [int(row["step"]) for row in rows[-1:]] or [0])
    facts: dict[str, Any] = {"step": step, "tokens": step * tokens_per_step, "checkpoints": saved}
    if starts:
        facts |= _speeds(starts, tokens_per_step)
    facts |= _last(rows, {"loss/train": "loss", "perf/tokens_per_second": "last_tokens_per_second"})
    validated = [row for row in rows if _finite(row.get("loss/validation"))]
    if validated:
        best = min(validated, key=lambda row: float(row["loss/validation"]))
        facts |= _last(
            validated, {"loss/validation": "validation", "validation/bits_per_byte": "bits_per_byte"}
        )
        facts |= {"best_validation": best["loss/validation"], "best_validation_step": int(best["step"])}
    return facts


def _speeds(starts: Sequence[StartRecord], tokens_per_step: int) -> dict[str, Any]:
    last, seconds = starts[-1], useful_seconds(starts)
    wall = max(last.last - starts[0].time, seconds)
    facts = {
        "start": last.start,
        "restarts": last.start - 1,
        "lost_steps": sum(record.lost_steps for record in starts),
        "start_seconds": last.last - last.time,
        "training_seconds": last.seconds,
        "wall_seconds": wall,
        "goodput": seconds / wall if wall > 0 else 0.0,
    }
    if last.seconds > 0:
        done = last.step - last.from_step
        facts["mean_tokens_per_second"] = done * tokens_per_step / last.seconds
    return facts


def _last(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, float]:
    """The newest finite value of each key in ``names``, under its new name."""
    found = {}
    for key, name in names.items():
        value = next((row[key] for row in reversed(rows) if _finite(row.get(key))), None)
        if value is not None:
            found[name] = float(value)
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _time_lines(facts: Mapping[str, Any]) -> list[str]:
    if "start" not in facts:
        return []
    again = f", {facts['restarts']} restart(s), {facts['lost_steps']} step(s) done again"
    lines = [
        f"  time: {short_time(facts['start_seconds'])} in this start, of which steps "
        f"{short_time(facts['training_seconds'])}; goodput {facts['goodput']:.1%} of "
        f"{short_time(facts['wall_seconds'])} since the first start{again}"
    ]
    if "mean_tokens_per_second" in facts:
        last = facts.get("last_tokens_per_second")
        shown = "" if last is None else f", {last:,.0f} at the last row"
        lines.append(f"  speed: {facts['mean_tokens_per_second']:,.0f} tokens/s on average{shown}")
    return lines


def _loss_lines(facts: Mapping[str, Any]) -> list[str]:
    parts = [f"train {facts['loss']:.4f}"] if "loss" in facts else []
    if "validation" in facts:
        parts.append(f"validation {facts['validation']:.4f}")
        parts.append(f"best {facts['best_validation']:.4f} at step {facts['best_validation_step']:,}")
    if "bits_per_byte" in facts:
        parts.append(f"bits/byte {facts['bits_per_byte']:.4f}")
    return [f"  loss: {', '.join(parts)}"] if parts else []


def _checkpoint_line(run_dir: Path, saved: Sequence[int]) -> str:
    if not saved:
        return f"  checkpoints: none in {run_dir / 'checkpoints'}"
    listed = ", ".join(f"{step:,}" for step in saved[-MOST_STEPS:])
    more = "..., " if len(saved) > MOST_STEPS else ""
    return f"  checkpoints: {len(saved)} in {run_dir / 'checkpoints'} (steps {more}{listed})"


def _next_line(run_dir: Path, outcome: str, *, newest: int, error: str) -> str:
    """What to do next; what ``error`` says itself is not contradicted."""
    if outcome == "finished":
        todo = f"trellis eval {shlex.quote(str(run_dir))}"
    elif outcome == "failed" and ("--run-dir" in error or not newest):
        todo = "do what the error says" + ("" if newest else "; no step is saved, a start begins at step 0")
    else:
        first = "put right what the error says; then " if outcome == "failed" else ""
        todo = f"{first}the same command " + (
            f"continues from step {newest:,}" if newest else "begins at step 0: no step is saved"
        )
    curves = run_dir / "tensorboard"
    return f"  next: {todo}" + (
        f"; tensorboard --logdir {shlex.quote(str(curves))}" if curves.is_dir() else ""
    )
