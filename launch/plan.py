"""`trellis plan`: what a recipe means, computed without starting anything."""

from __future__ import annotations

import json
from typing import Any

from launch.defaults import defaults
from launch.fit import fit_mesh, fit_to_devices
from launch.memory import estimate_memory
from launch.recipe import Recipe, dotted_items, resolve

__all__ = ["make_plan", "render_plan"]


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Resolved recipe, parameter counts, batch equation and memory per rank (bytes), as JSON types.

    Where ``mesh.dp`` is open, mesh, batch and memory are those of a start on this machine.
    """
    import torch

    from trellis_dist.models.counts import flops_per_token, parameter_counts

    fitted = fit_to_devices(recipe, torch.cuda.device_count())
    ranks = fitted.mesh.world_size() or 1
    mesh = fit_mesh(fitted, world_size=ranks)
    dp = mesh.dp or 1
    counts = parameter_counts(recipe.model)
    return {
        "recipe": resolve(recipe),
        "parameters": {
            "total": counts.total,
            "embedding": counts.embedding,
            "non_embedding": counts.non_embedding,
        },
        "flops_per_token": flops_per_token(recipe.model, sequence_length=recipe.data.sequence_length),
        "mesh": {"dp": dp, "sp": mesh.sp, "tp": mesh.tp, "ranks": ranks, "dp_open": recipe.mesh.dp is None},
        "batch": _batch(fitted, dp=dp),
        "memory_per_rank_bytes": estimate_memory(fitted, counts=counts, mesh=mesh),
    }


def _batch(recipe: Recipe, *, dp: int) -> dict[str, int]:
    micro = recipe.training.micro_batch
    return {
        "global_rows": recipe.global_rows,
        "micro_batch": micro,
        "accumulation": recipe.global_rows // (micro * dp),
        "dp": dp,
        "sequence_length": recipe.data.sequence_length,
        "global_batch_tokens": recipe.training.global_batch_tokens,
        "steps": recipe.training.steps,
        "tokens": recipe.tokens(),
    }


def render_plan(plan: dict[str, Any]) -> str:
    """The plan as text for a terminal."""
    sections = [
        ("resolved recipe (what differs from a default says so)", _recipe_lines(plan["recipe"])),
        (
            "choices the paper leaves open",
            [f"{k}: {v}" for k, v in sorted(plan["recipe"]["choices"].items())],
        ),
        ("parameters", _parameter_lines(plan)),
        ("batch", _batch_lines(plan["batch"], plan["mesh"])),
        ("memory per rank", _memory_lines(plan["memory_per_rank_bytes"], plan)),
    ]
    shown = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections if lines]
    return "\n\n".join(shown)


def _recipe_lines(resolved: dict[str, Any]) -> list[str]:
    known = defaults()
    lines = []
    for key, value in dotted_items(resolved):
        text = f"{key} = {json.dumps(value)}"
        if key in known and known[key] != value:
            text = f"{text:<58}  default: {json.dumps(known[key])}"
        lines.append(text)
    return lines


def _parameter_lines(plan: dict[str, Any]) -> list[str]:
    labels = {"total": "total", "embedding": "embeddings", "non_embedding": "without embeddings"}
    rows = [f"{labels[name]:<20} {n:>16,}  ({_short(n)})" for name, n in plan["parameters"].items()]
    total = plan["flops_per_token"] * plan["batch"]["tokens"]
    return [*rows, f"training FLOPs {plan['flops_per_token']:.3g} per token, {total:.3g} in all"]


def _batch_lines(batch: dict[str, int], mesh: dict[str, Any]) -> list[str]:
    open_dp = "; mesh.dp is open: this is what the devices of this machine give" if mesh["dp_open"] else ""
    return [
        f"mesh: dp {mesh['dp']} x sp {mesh['sp']} x tp {mesh['tp']} = {mesh['ranks']} rank(s){open_dp}",
        f"global rows {batch['global_rows']} = micro_batch {batch['micro_batch']} x accumulation "
        f"{batch['accumulation']} x dp {batch['dp']}",
        f"tokens per step {batch['global_batch_tokens']:,} = {batch['global_rows']} rows x "
        f"{batch['sequence_length']:,}",
        f"{batch['steps']:,} steps: {batch['tokens']:,} tokens ({_short(batch['tokens'])})",
    ]


def _memory_lines(memory: dict[str, int], plan: dict[str, Any]) -> list[str]:
    training = plan["recipe"]["training"]
    engine = training["engine"] + (
        f", ZeRO {training['zero_stage']}" if training["engine"] == "deepspeed" else ""
    )
    shown = {name: value for name, value in memory.items() if value}
    rows = [f"{name.replace('_', ' '):<22} {value / 2**20:>12,.1f} MiB" for name, value in shown.items()]
    return [f"engine: {engine}, {training['precision']}", *rows]


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
