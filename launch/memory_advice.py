"""What the planner says when memory is short: what takes it, and which one change would make it fit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.fit import fit_mesh, fit_to_devices
from launch.memory import estimate_memory
from launch.meshes import FRAGMENTATION, RESERVED_BYTES, changed

if TYPE_CHECKING:
    from launch.recipe import Recipe
    from trellis_dist.models.counts import ParameterCounts

__all__ = ["check_memory", "out_of_memory_advice", "rank_memory"]

# Where the estimate says that a run should have fitted and it did not, a change is worth naming that takes so
# much of the estimate away.
_WORTH = 0.85
_NAMED = 3
GB = 1e9


def out_of_memory_advice(recipe: Recipe, *, ranks: int | None = None, memory: int | None = None) -> str:
    """One line: what a rank's memory goes to, by the planner's estimate, and what would fit.

    Args:
        ranks: of the run; as the mesh says unless given.
        memory: bytes of one rank; those of this machine's device, or a share of its memory, unless given.
    """
    fitted, total, parts, counts = _estimate(recipe, ranks)
    available = rank_memory(fitted.mesh.world_size() or 1) if memory is None else memory
    largest = sorted(parts.items(), key=lambda item: -item[1])[:_NAMED]
    shown = ", ".join(f"{name.replace('_', ' ')} {size / GB:.2f}" for name, size in largest if size)
    line = f"the planner estimates {total / GB:.2f} GB a rank ({shown}) of {available / GB:.2f}"
    target = min((available - RESERVED_BYTES[_cuda()]) / FRAGMENTATION, _WORTH * total)
    found = [f"{words} ({size / GB:.2f} GB)" for words, size in _remedies(fitted, counts) if size <= target]
    if found:
        return f"{line}; what would fit: {', or '.join(found[:_NAMED])}"
    return (
        f"{line}; no one change of micro_batch, recomputation, engine or mesh is enough here: use more "
        "devices (trellis plan RECIPE --nodes N --devices D ranks what they allow) or a smaller model"
    )


def check_memory(recipe: Recipe, *, ranks: int) -> str:
    """A warning for a run that seems too large for its devices, an empty string for one that seems to fit.

    Raises:
        ValueError: weights, optimizer state and gradients alone are more than a GPU's memory holds.
    """
    fitted, total, parts, _ = _estimate(recipe, ranks)
    available, cuda = rank_memory(ranks), _cuda()
    if available >= total * FRAGMENTATION + RESERVED_BYTES[cuda]:
        return ""
    state = sum(parts[name] for name in ("weights", "master_weights", "optimizer_moments"))
    advice = out_of_memory_advice(fitted, ranks=ranks, memory=available)
    if cuda and state > available:
        raise ValueError(f"this run cannot fit its devices: {advice}")
    return f"this run may be out of memory: {advice}"


def rank_memory(ranks: int) -> int:
    """Bytes that one of ``ranks`` on this machine can have: its GPU's, or a share of what is available."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return _available() // max(1, min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))


def _available() -> int:
    """MemAvailable of Linux; elsewhere all memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _estimate(recipe: Recipe, ranks: int | None) -> tuple[Recipe, int, dict[str, int], ParameterCounts]:
    """The recipe on its ranks, and its estimate: total and parts on the device."""
    from trellis_dist.models.counts import parameter_counts

    counts = parameter_counts(recipe.model)
    world = ranks or recipe.mesh.world_size() or recipe.mesh.sp * recipe.mesh.tp
    fitted = fit_to_devices(recipe, world)
    found = estimate_memory(fitted, counts=counts, mesh=fitted.mesh, cuda=_cuda())
    parts = {name: size for name, size in found.items() if name not in _NO_PARTS}
    return fitted, found["total"], parts, counts


_NO_PARTS = ("total", "host_state", "host_snapshot")


def _remedies(recipe: Recipe, counts: ParameterCounts) -> Iterator[tuple[str, int]]:
    """Single changes that the run's combination check accepts, mildest first, with their estimates."""
    for words, other in _changes(recipe):
        try:
            mesh = fit_mesh(other, world_size=other.mesh.world_size() or 1)
        except ValueError:
            continue
        yield words, estimate_memory(other, counts=counts, mesh=mesh, cuda=_cuda())["total"]


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    training, mesh = recipe.training, recipe.mesh
    now = {
        "dp": mesh.dp,
        "sp": mesh.sp,
        "tp": mesh.tp,
        "engine": training.engine,
        "zero_stage": training.zero_stage,
        "micro_batch": training.micro_batch,
        "checkpointing": training.activation_checkpointing,
    }

    def other(**changes: object) -> Recipe:
        return changed(recipe, **{**now, **changes})  # type: ignore[arg-type]

    smaller = [rows for rows in range(training.micro_batch - 1, 0, -1) if training.micro_batch % rows == 0]
    for rows in smaller:
        yield f"training.micro_batch={rows}", other(micro_batch=rows)
    if training.forwards_first > 1:
        once = dataclasses.replace(training, forwards_first=1)
        yield "training.forwards_first=1", dataclasses.replace(recipe, training=once)
    for mode in ("selective", "full"):
        if mode != training.activation_checkpointing and training.activation_checkpointing != "full":
            words = f"training.activation_checkpointing={mode}"
            yield words, other(checkpointing=mode)
            if training.micro_batch > 1:
                yield f"{words} with training.micro_batch=1", other(checkpointing=mode, micro_batch=1)
    stage = training.zero_stage if training.engine == "deepspeed" else 0
    for number in range(stage + 1, 4):
        words = "training.engine=deepspeed with " if training.engine != "deepspeed" else ""
        yield f"{words}training.zero_stage={number}", other(engine="deepspeed", zero_stage=number)
    dp = mesh.dp or 1
    if dp % 2 == 0:
        aligned = "" if recipe.data.chunk_aligned else " and data.chunk_aligned=true"
        words = f"mesh.sp={2 * mesh.sp} with mesh.dp={dp // 2}{aligned}"
        yield words, other(sp=2 * mesh.sp, dp=dp // 2)
