"""The start-up lines: the recipe and what differs in it, batch equation, mesh, data, outputs."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import TokenDataset
from trellis_dist.models.counts import parameter_counts
from trellis_dist.parallel.mesh import Mesh
from trellis_dist.training.engines.factory import uses_bf16
from trellis_dist.training.job import Job
from trellis_dist.training.starts import Starts
from trellis_dist.training.state import Start

__all__ = ["describe_start", "recipe_lines"]

WIDTH = 110  # of recipe lines, where no terminal says its own
LONGEST_VALUE = 80
INDENT = " " * 14


def recipe_lines(
    recipe: Mapping[str, Any], changed: Mapping[str, Any], *, width: int | None = None
) -> list[str]:
    """The recipe, a wrapped paragraph per section; what is in ``changed`` is starred, its default follows.

    Args:
        recipe: resolved, as in ``recipe.json``; ``choices``, which is documentation, is left out.
        changed: dotted key -> default, of the keys that differ from it.
        width: characters per line, at least 40.
    """
    sections = {
        key: value for key, value in recipe.items() if isinstance(value, Mapping) and key != "choices"
    }
    title = f"recipe {recipe.get('name', 'without a name')}"
    lines = [f"{title}: {len(changed)} values differ from their defaults: *value [default]"]
    for name, section in sections.items():
        shown = [_shown(key, value, f"{name}.{key}", changed) for key, value in _leaves(section)]
        if shown:
            head = f"  {name:<11} "
            lines += textwrap.wrap(
                ", ".join(shown),
                width=max(40, width or WIDTH),
                initial_indent=head,
                subsequent_indent=INDENT,
                break_on_hyphens=False,
                break_long_words=False,
            )
    return lines


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(key: str, value: Any, dotted: str, changed: Mapping[str, Any]) -> str:
    star = "*" if dotted in changed else ""
    default = f" [{_value(changed[dotted])}]" if star else ""
    return f"{key}={star}{_value(value)}{default}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def describe_start(
    job: Job,
    *,
    mesh: Mesh,
    train: TokenDataset,
    validation: TokenDataset,
    start: Start,
    starts: Starts,
    run_dir: Path,
    width: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """What is about to run, as lines for a person and as facts (JSON types) for a program."""
    facts = _facts(job, mesh=mesh, train=train, start=start, starts=starts)
    lines = [
        *(recipe_lines(job.recipe, job.changed, width=width) if job.recipe else []),
        f"model: {facts['parameters']:,} parameters; engine: {facts['engine']}, {_precision(job, mesh)}",
        _mesh_line(mesh, facts),
        _batch_line(job, facts),
        _data_line(job, train, validation),
        *_row_lines(job, train),
        _origin_line(start, starts),
        f"run folder: {run_dir} (recipe.json, metrics.jsonl, console.jsonl, starts.jsonl, training.html"
        + (", tensorboard/" if job.logging.tensorboard else "")
        + f"); checkpoints/ every {job.checkpoint.interval} steps",
    ]
    return "\n".join(lines), facts


def _facts(job: Job, *, mesh: Mesh, train: TokenDataset, start: Start, starts: Starts) -> dict[str, Any]:
    training, rows = job.training, job.global_rows
    zero = f" ZeRO {training.zero_stage}" if training.engine == "deepspeed" else ""
    return {
        "start": starts.record.start,
        "resumed_step": start.progress.step,
        "steps": training.steps,
        "parameters": parameter_counts(job.model).total,
        "engine": training.engine + zero,
        "precision": "bf16" if uses_bf16(training, mesh) else "fp32",
        "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
        "mesh": {"dp": mesh.dp, "sp": mesh.sp, "tp": mesh.tp, "ranks": mesh.world_size},
        "batch": {
            "micro_batch": training.micro_batch,
            "accumulation": rows // (training.micro_batch * mesh.dp),
            "dp": mesh.dp,
            "rows": rows,
            "sequence_length": job.data.sequence_length,
            "tokens": training.global_batch_tokens,
        },
        "data": {"directory": job.data.directory, "fingerprint": train.fingerprint},
        "changed": dict(job.changed),
        "torch": str(torch.__version__),
    }


def _precision(job: Job, mesh: Mesh) -> str:
    precision = "bf16" if uses_bf16(job.training, mesh) else "fp32"
    asked = "" if job.training.precision == precision else " (bf16 was asked for; a CPU computes in fp32)"
    return precision + asked


def _mesh_line(mesh: Mesh, facts: Mapping[str, Any]) -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = -(-mesh.world_size // max(1, here))
    where = facts["device"] if facts["device"] != "cpu" else f"cpu, {torch.get_num_threads()} thread(s) each"
    return (
        f"mesh: dp {mesh.dp} x sp {mesh.sp} x tp {mesh.tp} = {mesh.world_size} rank(s) on {nodes} node(s): "
        f"{where}; torch {facts['torch']}"
    )


def _batch_line(job: Job, facts: Mapping[str, Any]) -> str:
    batch, steps = facts["batch"], job.training.steps
    return (
        f"batch: micro {batch['micro_batch']} x accumulation {batch['accumulation']} x dp {batch['dp']} = "
        f"{batch['rows']} rows of {batch['sequence_length']:,} = {batch['tokens']:,} tokens per step; "
        f"x {steps:,} steps = {steps * batch['tokens']:,} tokens"
    )


def _data_line(job: Job, train: TokenDataset, validation: TokenDataset) -> str:
    passes = job.training.steps * job.global_rows / max(1, train.num_samples)
    return (
        f"data: {job.data.directory}, fingerprint {train.fingerprint[:12]}; {train.num_tokens:,} tokens in "
        f"{train.num_samples:,} rows, {passes:,.2f} passes in all; {train.utilisation:.1%} of the positions "
        f"predict; validation {validation.num_tokens:,} tokens"
    )


def _row_lines(job: Job, train: TokenDataset) -> Iterator[str]:
    """How rows are packed and mixed, where that is not the plain way."""
    if job.data.packing != "concat" or job.data.chunk_aligned:
        where = ", documents start at multiples of a chunk" if job.data.chunk_aligned else ""
        yield f"packing: {job.data.packing}{where}; {train.utilisation:.1%} of the positions predict"
    if job.data.carry_rows > 1:
        yield f"states: carried through {job.data.carry_rows} consecutive rows"
    if len(train.source_rows) > 1:
        parts = [f"{name} {count / train.order.size:.1%}" for name, count in train.order.shares.items()]
        yield f"mixture: {', '.join(parts)} of the rows"


def _origin_line(start: Start, starts: Starts) -> str:
    number = f"start {starts.record.start} of the run"
    lost = starts.record.lost_steps
    if start.checkpoint is not None:
        again = f", which does {lost} steps again" if lost else ""
        return f"resuming from {start.checkpoint}: {number}{again}"
    if start.weights is not None:
        return f"weights from {start.weights}: {number}"
    return f"new weights, seeded: {number}" + (f", which does {lost} steps again" if lost else "")
