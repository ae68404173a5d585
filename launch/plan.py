"""`trellis plan`: what a recipe means, computed without starting anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, get_type_hints

from launch.fit import fit_mesh, fit_to_devices
from launch.recipe import Recipe, dotted_items, resolve
from trellis_dist.models.config import ModelConfig

__all__ = ["defaults", "make_plan", "render_plan"]

# Elements of width dim that one token leaves for the backward pass in one Trellis block: residual, two norms,
# q k v before and after convolution and normalisation, gate twice, output, post-norm, gated output.
_BLOCK_ACTIVATIONS = 17
_SEGMENT_TOKENS = 256  # from one memory that the compress operation keeps for backward to the next
# Elements of the largest block of logits (models/loss.py): on a CPU, where fp32 runs, and on a GPU.
_LOGIT_BLOCK = {"fp32": 1 << 21, "bf16": 1 << 28}


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
        "memory_per_rank_bytes": _memory(fitted, parameters=counts.total, replicas=dp * mesh.sp),
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


def _memory(recipe: Recipe, *, parameters: int, replicas: int) -> dict[str, int]:
    """Bytes by part on one rank; ZeRO 1 divides masters and moments over the ``replicas`` (dp * sp) ranks."""
    training = recipe.training
    half = training.precision == "bf16"
    zero = training.engine == "deepspeed" and training.zero_stage == 1
    owned = -(-parameters // replicas) if zero else parameters
    moments = 8 if recipe.optimizer.kind == "adamw" else 0
    parts = {
        "weights": parameters * (2 if half else 4),
        # The local engine accumulates gradients in fp32, on its masters.
        "gradients": parameters * (2 if half and training.engine == "deepspeed" else 4),
        "master_weights": owned * 4 if zero or half else 0,
        "optimizer_moments": owned * moments,
        "activations_estimate": _activations(recipe),
    }
    return {**parts, "total": sum(parts.values())}


def _activations(recipe: Recipe) -> int:
    """What one micro-batch keeps for its backward pass, and what the layer in work adds to it.

    Blocks and the loss; of every Trellis layer the memories at segment starts, of the one in work those at
    all chunk starts and their adjoints (docs/kernels.md).
    """
    model, width = recipe.model, 2 if recipe.training.precision == "bf16" else 4
    tokens = recipe.training.micro_batch * recipe.data.sequence_length // recipe.mesh.sp
    blocks = tokens * model.num_layers * width * _block_elements(model)
    chunk, pair = model.trellis.chunk_size, 2 * model.trellis.slots * model.dim * 4
    trellis_layers = sum(model.layer_kind(layer) == "trellis" for layer in range(model.num_layers))
    kept = trellis_layers * pair * -(-tokens // max(chunk, _SEGMENT_TOKENS))
    in_work = min(trellis_layers, 1) * 2 * pair * -(-tokens // chunk)
    return blocks + kept + in_work + _head(recipe, tokens)


def _head(recipe: Recipe, tokens: int) -> int:
    """The loss keeps its two gradients, and one block of logits (fp32) with its softmax while it runs."""
    model = recipe.model
    block = min(tokens * model.vocab_size, _LOGIT_BLOCK[recipe.training.precision])
    return (model.vocab_size + tokens) * model.dim * 4 + 2 * block * 4


def _block_elements(model: ModelConfig) -> int:
    return _BLOCK_ACTIVATIONS * model.dim + 2 * model.num_heads * model.trellis.slots + 4 * model.mlp_width


def defaults(section: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Default of every dotted key that has one; a key that a recipe must give is absent."""
    return dict(_defaults(section, prefix))


def _defaults(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _defaults(hints[item.name], f"{prefix}{item.name}.")
        elif item.default is not dataclasses.MISSING:
            yield f"{prefix}{item.name}", json.loads(json.dumps(item.default))


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
    rows = [f"{name.replace('_', ' '):<22} {value / 2**20:>12,.1f} MiB" for name, value in memory.items()]
    return [f"engine: {engine}, {training['precision']}", *rows]


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
