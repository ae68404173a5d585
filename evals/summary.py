"""RUN/summary.json: the numbers of a run in one flat mapping."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from evals.ruler.catalogue import RULER
from evals.tasks.registry import TASKS
from trellis_dist.files import read_json, write_json
from trellis_dist.training.metrics import read_rows

__all__ = ["read_metrics", "read_results", "summarise", "write_summary"]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl, what was not finite (written as null) left out.

    Of a step written twice (before and after a resume) the later row counts.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        finite = {key: value for key, value in row.items() if value is not None}
        rows[row["step"]] = rows.get(row["step"], {}) | finite
    return [rows[step] for step in sorted(rows)]


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Per task the record of the highest step."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted((run_dir / "evals").glob("*-step-*.json")):
        record = read_json(path)
        if record["task"] not in newest or record["step"] > newest[record["task"]]["step"]:
            newest[record["task"]] = record
    return newest


def write_summary(run_dir: Path, stages: Mapping[str, float]) -> dict[str, Any]:
    """Write and return the summary; ``stages`` are seconds by stage. A key is absent when not measured."""
    run_dir = Path(run_dir)
    summary = summarise(run_dir, stages)
    write_json(run_dir / "summary.json", summary)
    return summary


def summarise(run_dir: Path, stages: Mapping[str, float]) -> dict[str, Any]:
    """The summary of what a run folder holds: "step/TASK" says what was scored, "step" where all are equal.

    "step/train" is the last step trained, whose "tokens" and "loss/train" these are.
    """
    results = read_results(run_dir)
    metrics = read_metrics(run_dir)
    summary: dict[str, Any] = _training(metrics)
    steps = {"train": summary.pop("step")} if "step" in summary else {}
    parts: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
        "perplexity": _perplexity,
        **{name: partial(_ruler, name) for name in RULER},
        "mqar": _mqar,
        "decode": _decode,
    }
    for name, task in TASKS.items():
        if name in results:
            summary |= parts.get(name, task.scalars)(results[name]["result"])
            steps[name] = results[name]["step"]
    summary |= {f"step/{name}": step for name, step in steps.items()}
    if len(set(steps.values())) == 1:
        summary["step"] = next(iter(steps.values()))
    summary |= {f"seconds/{name}": float(seconds) for name, seconds in stages.items()}
    return summary


def _training(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Last step, tokens and loss; the median speed, which a slow first step does not change.

    ``loss/validation`` of the rows is left out: it may be of the first rows only, and the summary has
    ``validation/loss``, of the whole split.
    """
    summary: dict[str, Any] = {}
    for row in metrics:
        summary |= {key: row[key] for key in ("step", "tokens", "loss/train") if key in row}
    speeds = [row["perf/tokens_per_second"] for row in metrics if "perf/tokens_per_second" in row]
    if speeds:
        summary["perf/tokens_per_second"] = statistics.median(speeds)
    return summary


def _perplexity(result: Mapping[str, Any]) -> dict[str, float]:
    on_text = (
        {"text/bits_per_byte": result["on_text"]["model"]["bits_per_byte"]} if "on_text" in result else {}
    )
    return {
        **on_text,
        "validation/bits_per_byte": result["model"]["bits_per_byte"],
        "validation/loss": result["model"]["loss"],
        "baseline/bigram_bits_per_byte": result["bigram"]["bits_per_byte"],
        "baseline/bigram_loss": result["bigram"]["loss"],
        "baseline/unigram_bits_per_byte": result["unigram"]["bits_per_byte"],
        "baseline/unigram_loss": result["unigram"]["loss"],
        "ln_vocab": result["ln_vocab"],
    }


def _ruler(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """By length, for a single needle in each of its two ways of scoring; with chance and the oracle."""
    ways = tuple(result["chance"])
    summary: dict[str, float] = {}
    for way in ways:
        prefix = f"{name}/{way}" if len(ways) > 1 else name
        summary |= {f"{prefix}/{row['length']}": row[way]["score"] for row in result["rows"]}
        summary |= {f"{prefix}/{bound}": result[bound][way] for bound in ("chance", "oracle")}
    return summary


def _mqar(result: Mapping[str, Any]) -> dict[str, float]:
    """By pairs and length."""
    summary = {f"mqar/{group}": part["score"] for group, part in result["groups"].items()}
    return summary | {f"mqar/{bound}": result[bound] for bound in ("chance", "oracle")}


def _decode(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"decode/{model}/{name}/{row['position']}": row[name]
        for model in ("model", "attention")
        for row in result[model]
        for name in ("state_bytes", "ms_per_token")
    }
