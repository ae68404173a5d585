"""What the planner says when memory is short: what takes it, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.fit import fit_to_devices
from launch.planning.memory import NO_PARTS, estimate_memory
from launch.planning.meshes import FRAGMENTATION, RESERVED_BYTES
from launch.planning.rank_memory import host_share, rank_memory
from launch.planning.remedies import Remedy, Search

if TYPE_CHECKING:
    from launch.recipe import Recipe
    from trellis_dist.models.counts import ParameterCounts

__all__ = ["check_memory", "killed_advice", "out_of_memory_advice"]

# Where the estimate says that a run should have fitted and it did not, a change is worth naming that takes so
# much of the estimate away.
_WORTH = 0.85
_NAMED = 3
GB = 1e9


def out_of_memory_advice(recipe: Recipe, *, ranks: int | None = None, memory: int | None = None) -> str:
    """One line: what a rank's memory goes to, by the planner's estimate, and what would fit.

    Args:
        ranks: of the run; as the mesh says unless given.
        memory: bytes of one rank; what one on this machine can have unless given.
    """
    fitted, found, counts = _estimate(recipe, ranks)
    available = rank_memory(fitted.mesh.world_size() or 1) if memory is None else memory
    total, target = found["total"], _room(found, available)
    line = f"{_shown(found)} of {available / GB:.2f}"
    search = Search(fitted, counts=counts, cuda=_cuda(), host=host_share(fitted.mesh.world_size() or 1))
    if total <= target:  # and yet it did not fit: by how much is not known
        less, _ = search.reach(_WORTH * total)
        return f"{line}; what would take less: {_listed(sorted(less, key=lambda remedy: remedy.total))}"
    fitting, least = search.reach(target)
    if fitting:
        return f"{line}; what would fit: {_listed(fitting)}"
    most = f" (the least is {least})" if least is not None and least.total < total else ""
    return (
        f"{line}; nothing that this recipe can change is enough here{most}: use more devices (trellis plan "
        "RECIPE --nodes N --devices D ranks what they allow) or a smaller model"
    )


def killed_advice(recipe: Recipe, *, here: int) -> str:
    """One line for a rank, one of ``here`` on this machine, that was killed, perhaps for its host memory."""
    fitted, found, _ = _estimate(recipe, None)
    available = host_share(here)
    if _cuda():  # a GPU that is full kills nobody
        host = found["host_state"] + found["host_snapshot"]
        return (
            f"in host memory the planner expects {host / GB:.2f} GB a rank, of offloaded state and of copies "
            f"that saves are written from, of {available / GB:.2f}"
        )
    if found["total"] > _room(found, available):
        return out_of_memory_advice(fitted, memory=available)
    return f"{_shown(found)} of {available / GB:.2f}"


def check_memory(recipe: Recipe, *, ranks: int) -> str:
    """A warning for a run that seems too large for its devices, an empty string for one that seems to fit.

    Raises:
        ValueError: weights and optimizer state alone are more than a GPU's memory holds.
    """
    fitted, found, _ = _estimate(recipe, ranks)
    available, cuda = rank_memory(ranks), _cuda()
    if found["total"] <= _room(found, available):
        return ""
    state = sum(found[name] for name in ("weights", "master_weights", "optimizer_moments"))
    advice = out_of_memory_advice(fitted, ranks=ranks, memory=available)
    if cuda and state > available:
        raise ValueError(f"this run cannot fit its devices: {advice}")
    return f"this run may be out of memory: {advice}"


def _room(found: dict[str, int], available: int) -> float:
    """Live bytes that ``available`` bytes of one rank have room for, at the estimate's own loss."""
    cuda = _cuda()
    loss = FRAGMENTATION if cuda else found["resident"] / found["total"]
    return (available - RESERVED_BYTES[cuda]) / loss


def _shown(found: dict[str, int]) -> str:
    parts = {name: size for name, size in found.items() if name not in NO_PARTS and size}
    largest = sorted(parts.items(), key=lambda item: -item[1])[:_NAMED]
    shown = ", ".join(f"{name.replace('_', ' ')} {size / GB:.2f}" for name, size in largest)
    return f"the planner estimates {found['total'] / GB:.2f} GB a rank ({shown})"


def _listed(found: Sequence[Remedy]) -> str:
    return ", or ".join(map(str, found[:_NAMED])) or "a smaller model"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _estimate(recipe: Recipe, ranks: int | None) -> tuple[Recipe, dict[str, int], ParameterCounts]:
    """The recipe on its ranks, and its estimate."""
    from trellis_dist.models.counts import parameter_counts

    counts = parameter_counts(recipe.model)
    world = ranks or recipe.mesh.world_size() or recipe.mesh.sp * recipe.mesh.tp
    fitted = fit_to_devices(recipe, world)
    return fitted, estimate_memory(fitted, counts=counts, mesh=fitted.mesh, cuda=_cuda()), counts
