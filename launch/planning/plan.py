"""`trellis plan`: what a recipe means, computed without starting anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from launch.defaults import defaults
from launch.fit import fit_mesh, fit_to_devices
from launch.planning.cluster import Cluster, this_machine
from launch.planning.memory import estimate_memory, phase_peaks
from launch.planning.meshes import RESERVED_BYTES, fits, rank_meshes, taken
from launch.planning.step_time import predict, ties
from launch.planning.tables import candidate_lines, disk_lines, short, time_lines, verdict_lines
from launch.preflight import checkpoint_bytes, most_kept
from launch.recipe import Recipe, dotted_items, resolve

__all__ = ["make_plan", "render_plan"]


def make_plan(recipe: Recipe, cluster: Cluster | None = None) -> dict[str, Any]:
    """Resolved recipe, counts, batch, memory, predicted time and disk, as JSON types (bytes, seconds).

    All of it is that of a start on this machine, or with ``cluster`` on its devices, of which an open
    ``mesh.dp`` takes all it can; then the ways to run there are ranked too ("candidates"). "own_mesh" says
    whether the recipe as it is can run there; where it has too few devices, "prediction" is None.
    """
    import torch

    from trellis_dist.models.counts import flops_per_token, parameter_counts

    fitted = fit_to_devices(recipe, cluster.devices if cluster else torch.cuda.device_count())
    ranks = fitted.mesh.world_size() or 1
    mesh = fit_mesh(fitted, world_size=ranks)
    dp = mesh.dp or 1
    counts = parameter_counts(recipe.model)
    where = cluster or this_machine(ranks=ranks)
    memory = estimate_memory(fitted, counts=counts, mesh=mesh, cuda=where.cuda)
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
        "own_mesh": _verdict(memory, where, ranks=ranks),
        "memory_per_rank_bytes": memory,
        "memory_peaks_bytes": phase_peaks(fitted, counts=counts, mesh=mesh, cuda=where.cuda),
        "prediction": _prediction(fitted, where, counts=counts, mesh=mesh)
        if ranks <= where.devices
        else None,
        "disk": _disk(recipe),
        **(_ways(fitted, cluster, counts) if cluster else {}),
    }


def _verdict(memory: Mapping[str, int], cluster: Cluster, *, ranks: int) -> dict[str, Any]:
    """Whether the recipe's own mesh runs: devices that it takes of those there are, and what is wrong.

    "fits" is None where the devices' memory is not known.
    """
    problem, room = None, fits(memory, cluster) if cluster.memory_bytes else None
    if ranks > cluster.devices:
        fewer = "lower mesh.dp, mesh.sp or mesh.tp"
        problem = f"cannot run: the mesh needs {ranks} devices of {cluster.devices}: {fewer}"
    elif room is False:
        needed, process = taken(memory, cuda=cluster.cuda) / 1e9, RESERVED_BYTES[cluster.cuda] / 1e9
        problem = (
            f"does not fit, by this estimate: a rank takes {needed:.1f} GB of {cluster.memory_gb:.1f} "
            f"(tensors, what the allocator loses, {process:g} GB a process): "
            "lower training.micro_batch, recompute, or divide more"
        )
    return {
        "cuda": cluster.cuda,
        "devices": cluster.devices,
        "devices_used": ranks,
        "fits": room,
        "problem": problem,
    }


def _prediction(recipe: Recipe, cluster: Cluster, *, counts: Any, mesh: Any) -> dict[str, Any]:
    """The step on the recipe's own mesh: a prediction, nothing was run."""
    found = predict(recipe, cluster, counts=counts, mesh=mesh)
    speed = recipe.training.global_batch_tokens / found.total
    return {
        "device": cluster.name,
        "tflops": cluster.peak_tflops(recipe.training.precision),
        "precision": "fp32" if not cluster.cuda else recipe.training.precision,
        "peak_known": recipe.training.precision == "bf16" or not cluster.cuda or cluster.tflops_fp32 > 0,
        "efficiency": cluster.efficiency,
        "tied": bool(ties(recipe, mesh)),
        "step_seconds": found.total,
        "step_seconds_by_part": dataclasses.asdict(found),
        "tokens_per_second": speed,
        "days": recipe.tokens() / speed / 86400,
    }


def _disk(recipe: Recipe) -> dict[str, Any]:
    """Checkpoints that retention can keep and the one being written; token shards."""
    from data_pipeline.shard import token_dtype

    one, kept = checkpoint_bytes(recipe), most_kept(recipe.checkpoint, steps=recipe.training.steps)
    limits = [source.max_tokens for source in recipe.data.sources.values()]
    known = [limit for limit in limits if limit is not None]
    tokens = sum(known) if len(known) == len(limits) else None
    width = token_dtype(recipe.data.tokenizer.vocab_size).itemsize
    return {
        "checkpoint_bytes": one,
        "checkpoints_kept": kept,
        "checkpoints_bytes": one * (kept + 1),
        "data_tokens": tokens,
        "data_bytes": None if tokens is None else tokens * width,
        "bytes_per_token": width,
    }


def _ways(recipe: Recipe, cluster: Cluster, counts: Any) -> dict[str, Any]:
    found, refused = rank_meshes(recipe, cluster, counts=counts)
    return {
        "cluster": dataclasses.asdict(cluster) | {"total_devices": cluster.devices},
        "candidates": [one.as_json() for one in found],
        "refused": refused,
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
        ("batch", _batch_lines(plan)),
        ("the recipe as it is, on these devices", verdict_lines(plan["own_mesh"])),
        ("memory per rank", _memory_lines(plan["memory_per_rank_bytes"], plan)),
        ("time (a prediction: nothing was run)", time_lines(plan)),
        ("disk", disk_lines(plan["disk"])),
        ("ways to run on the cluster, fastest first (predictions)", candidate_lines(plan)),
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
    rows = [f"{labels[name]:<20} {n:>16,}  ({short(n)})" for name, n in plan["parameters"].items()]
    total = plan["flops_per_token"] * plan["batch"]["tokens"]
    return [*rows, f"training FLOPs {plan['flops_per_token']:.3g} per token, {total:.3g} in all"]


def _batch_lines(plan: dict[str, Any]) -> list[str]:
    batch, mesh, own = plan["batch"], plan["mesh"], plan["own_mesh"]
    where = "cluster" if "cluster" in plan else "machine"
    given = f"; mesh.dp is open: this is what the devices of this {where} give"
    open_dp = given if mesh["dp_open"] and own["devices_used"] <= own["devices"] else ""
    return [
        f"mesh: dp {mesh['dp']} x sp {mesh['sp']} x tp {mesh['tp']} = {mesh['ranks']} rank(s){open_dp}",
        f"global rows {batch['global_rows']} = micro_batch {batch['micro_batch']} x accumulation "
        f"{batch['accumulation']} x dp {batch['dp']}",
        f"tokens per step {batch['global_batch_tokens']:,} = {batch['global_rows']} rows x "
        f"{batch['sequence_length']:,}",
        f"{batch['steps']:,} steps: {batch['tokens']:,} tokens ({short(batch['tokens'])})",
    ]


def _memory_lines(memory: dict[str, int], plan: dict[str, Any]) -> list[str]:
    training = plan["recipe"]["training"]
    engine = training["engine"] + (
        f", ZeRO {training['zero_stage']}" if training["engine"] == "deepspeed" else ""
    )
    wide = training["precision"] == "bf16" and not plan["own_mesh"]["cuda"]
    precision = "fp32 (as a CPU computes, for bf16)" if wide else training["precision"]
    shown = {name: value for name, value in memory.items() if value}
    rows = [f"{name.replace('_', ' '):<22} {value / 2**20:>12,.1f} MiB" for name, value in shown.items()]
    peaks = plan["memory_peaks_bytes"]
    phases = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in peaks.items())
    return [
        f"engine: {engine}, {precision}; at the fullest moment of a step, of live tensors",
        *rows,
        f"most in each phase (MiB): {phases}",
    ]
