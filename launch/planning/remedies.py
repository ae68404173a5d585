"""Changes of a recipe that make a rank take less memory, mildest first, with the planner's estimates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.fit import fit_mesh
from launch.planning.memory import estimate_memory

if TYPE_CHECKING:
    from launch.recipe import Recipe
    from trellis_dist.models.counts import ParameterCounts

__all__ = ["Remedy", "Search"]

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Remedy:
    """Settings by key, of one lever or several, and the bytes of a rank under them."""

    settings: Settings
    total: int

    def __str__(self) -> str:
        words = (f"{key}={str(value).lower()}" for key, value in self.settings.items())
        return f"{' with '.join(words)} ({self.total / 1e9:.2f} GB)"


@dataclass(frozen=True)
class Search:
    """Looks for remedies.

    Attributes:
        recipe: with ``mesh.dp`` filled in.
        counts: its parameters.
        cuda: ranks have a GPU each.
        host: bytes of the host that a rank can have, for what is offloaded.
    """

    recipe: Recipe
    counts: ParameterCounts
    cuda: bool
    host: int

    def reach(self, target: float) -> tuple[list[Remedy], Remedy | None]:
        """What brings a rank to ``target`` bytes with as few levers as that takes, and the most there is.

        One remedy for every set of levers, the mildest that does. Rows are shortened only where nothing else
        does, because that changes what is trained.
        """
        levers = _levers(self.recipe, cuda=self.cuda)
        least: Remedy | None = None
        for usable in (levers, [*levers, _shorter_rows(self.recipe)]):
            for number in range(1, len(usable) + 1):
                found = []
                for together in itertools.combinations(usable, number):
                    priced = list(self._priced(together))
                    found.extend([remedy for remedy in priced if remedy.total <= target][:1])
                    least = min([*priced, *([least] if least else [])], key=_total, default=None)
                if found:
                    return found, least
        return [], least

    def _priced(self, levers: Sequence[Sequence[Settings]]) -> Iterator[Remedy]:
        """One setting of each lever, mildest first, as far as the run's combination check accepts them."""
        for chosen in itertools.product(*levers):
            settings = {key: value for one in chosen for key, value in one.items()}
            try:
                other = _with(self.recipe, settings)
                mesh = fit_mesh(other, world_size=other.mesh.world_size() or 1)
            except ValueError:
                continue
            memory = estimate_memory(other, counts=self.counts, mesh=mesh, cuda=self.cuda)
            if memory["host_state"] <= self.host:
                yield Remedy(settings, memory["total"])


def _total(remedy: Remedy) -> int:
    return remedy.total


def _with(recipe: Recipe, settings: Settings) -> Recipe:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        replaced = dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{section: replaced})
    return recipe


def _levers(recipe: Recipe, *, cuda: bool) -> list[list[Settings]]:
    """What can be changed, mildest first, and how far: the settings of one lever exclude each other."""
    training = recipe.training
    rows = [number for number in range(training.micro_batch - 1, 0, -1) if training.micro_batch % number == 0]
    levels = ("none", "selective", "full")
    higher = levels[levels.index(training.activation_checkpointing) + 1 :]
    found: list[list[Settings]] = [
        [{"training.micro_batch": number} for number in rows],
        [{"training.forwards_first": 1}] if training.forwards_first > 1 else [],
        [{"training.activation_checkpointing": level} for level in higher],
        _engines(recipe),
        _splits(recipe),
        # Host memory is what a CPU rank trains in.
        [{"training.offload_optimizer": True}] if cuda and not training.offload_optimizer else [],
    ]
    return [lever for lever in found if lever]


def _engines(recipe: Recipe) -> list[Settings]:
    """Engines that divide more; there must be ranks to divide among."""
    training, mesh = recipe.training, recipe.mesh
    if (mesh.dp or 1) * mesh.sp == 1 or training.engine == "fsdp2":
        return []
    stage = training.zero_stage if training.engine == "deepspeed" else 0
    other: Settings = {"training.engine": "deepspeed"} if training.engine != "deepspeed" else {}
    found: list[Settings] = [{**other, "training.zero_stage": number} for number in range(stage + 1, 4)]
    return [*found, {"training.engine": "fsdp2"}] if (mesh.dp or 1) > 1 else found


def _splits(recipe: Recipe) -> list[Settings]:
    """Two replicas made one of twice the segments, or of twice the tensor-parallel ranks."""
    mesh, dp = recipe.mesh, recipe.mesh.dp or 1
    if dp % 2:
        return []
    aligned: Settings = {} if recipe.data.chunk_aligned else {"data.chunk_aligned": True}
    split: Settings = {} if mesh.tp > 1 else {"tensor.sequence_parallel": True}
    return [
        {"mesh.sp": 2 * mesh.sp, "mesh.dp": dp // 2, **aligned},
        {"mesh.tp": 2 * mesh.tp, "mesh.dp": dp // 2, **split},
    ]


def _shorter_rows(recipe: Recipe) -> list[Settings]:
    """A half and a quarter of the row, at the same tokens a step."""
    return [{"data.sequence_length": recipe.data.sequence_length // part} for part in (2, 4)]
