"""A recipe on the machine it meets: the mesh that its sections allow, and one that the devices allow."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from trellis_dist.parallel.config import MeshConfig

if TYPE_CHECKING:
    from launch.recipe import Recipe

__all__ = ["fit_mesh", "fit_to_devices", "what_was_fitted"]


def fit_mesh(recipe: Recipe, *, world_size: int) -> MeshConfig:
    """The recipe's mesh with ``dp`` filled in for ``world_size`` ranks.

    Raises:
        ValueError: it, the packing or the engine on it cannot work there; the arithmetic is in the message.
    """
    from trellis_dist.training.combination import check_combination

    return check_combination(
        mesh=recipe.mesh,
        tensor=recipe.tensor,
        sequence=recipe.sequence,
        model=recipe.model,
        data=recipe.data,
        training=recipe.training,
        global_rows=recipe.global_rows,
        world_size=world_size,
    )


def fit_to_devices(recipe: Recipe, devices: int) -> Recipe:
    """The recipe with an open ``mesh.dp`` filled in and the micro-batch lowered to what then divides.

    Replicas are the most that ``devices`` CUDA devices hold (``mesh.cpu_dp`` without any) and that divide the
    global rows; the micro-batch is the largest divisor of a replica's rows up to ``training.micro_batch``.
    The rows of a step stay the same. A recipe that names ``mesh.dp`` comes back as it is.
    """
    if recipe.mesh.dp is not None:
        return recipe
    rows = recipe.global_rows
    replicas = devices // (recipe.mesh.sp * recipe.mesh.tp) if devices else recipe.mesh.cpu_dp
    dp = _largest_divisor(rows, replicas)
    micro_batch = _largest_divisor(rows // dp, recipe.training.micro_batch)
    return dataclasses.replace(
        recipe,
        mesh=dataclasses.replace(recipe.mesh, dp=dp),
        training=dataclasses.replace(recipe.training, micro_batch=micro_batch),
    )


def what_was_fitted(recipe: Recipe, fitted: Recipe, *, devices: int) -> str:
    """One line for the user when the devices changed more than ``mesh.dp``, else an empty string."""
    said = []
    ranks = fitted.mesh.world_size() or 1
    if recipe.mesh.dp is None and devices > ranks:
        said.append(f"{ranks} of {devices} devices are used")
    before, after = recipe.training.micro_batch, fitted.training.micro_batch
    if before != after:
        said.append(f"training.micro_batch {before} -> {after}")
    reason = f"{recipe.global_rows} rows per step on mesh.dp = {fitted.mesh.dp}"
    return f"{reason}: {', '.join(said)}" if said else ""


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is no more than ``limit``; 1 for a limit below that."""
    return next((size for size in range(min(number, limit), 1, -1) if number % size == 0), 1)
