"""Every mesh, engine, recomputation and micro-batch that a cluster's devices allow a recipe, ranked by speed.

Only what ``check_combination`` accepts is offered; the others are counted by reason.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launch.fit import fit_mesh
from launch.planning.cluster import Cluster
from launch.planning.memory import estimate_memory
from launch.planning.step_time import StepTime, predict, ties
from launch.recipe import Recipe
from trellis_dist.models.counts import ParameterCounts

__all__ = [
    "FRAGMENTATION",
    "RESERVED_BYTES",
    "Candidate",
    "changed",
    "fits",
    "rank_meshes",
    "settings_of",
    "taken",
]

# What the allocator and the libraries take beside live tensors on a GPU: a share of them, and CUDA's context,
# NCCL and cuBLAS (assumptions). On a CPU the process beside what launch.planning.memory counts as resident.
FRAGMENTATION = 1.06
RESERVED_BYTES = {False: 400 * 10**6, True: 2 * 10**9}

# Most rows of a micro-batch that are tried: more make matrix products no faster.
_MOST_ROWS = 64
_CHECKPOINTING = ("none", "selective", "full")
_ENGINES: tuple[tuple[str, int], ...] = (
    ("local", 0),
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
    ("fsdp2", 0),
)


@dataclass(frozen=True)
class Candidate:
    """A way to run the recipe on devices of a cluster.

    Attributes:
        recipe: with mesh, engine, recomputation and micro-batch set.
        memory: bytes by part, as `estimate_memory` gives them.
        time: the predicted step.
    """

    recipe: Recipe
    memory: dict[str, int]
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.recipe.training.global_batch_tokens / self.time.total

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        training, mesh = self.recipe.training, self.recipe.mesh
        return {
            "mesh": {"dp": mesh.dp, "sp": mesh.sp, "tp": mesh.tp},
            "devices": mesh.world_size(),
            "tied": bool(ties(self.recipe, mesh)),
            "engine": training.engine,
            "zero_stage": training.zero_stage if training.engine == "deepspeed" else None,
            "micro_batch": training.micro_batch,
            "activation_checkpointing": training.activation_checkpointing,
            "memory_per_rank_bytes": self.memory,
            "step_seconds": self.time.total,
            "step_seconds_by_part": dataclasses.asdict(self.time),
            "tokens_per_second": self.tokens_per_second,
            "days": self.recipe.tokens() / self.tokens_per_second / 86400,
            "set": settings_of(self.recipe),
        }


def rank_meshes(
    recipe: Recipe, cluster: Cluster, *, counts: ParameterCounts
) -> tuple[list[Candidate], dict[str, int]]:
    """Feasible ways on all devices of ``cluster``, fastest first, and how many others each reason refuses.

    Where there is none, those on as many devices as possible, more than half of all.
    """
    found, refused = _ranked(recipe, cluster, counts=counts, devices=cluster.devices)
    for fewer in range(cluster.devices - 1, cluster.devices // 2, -1):
        if found:
            break
        found, _ = _ranked(recipe, cluster, counts=counts, devices=fewer)
    return found, refused


def _ranked(
    recipe: Recipe, cluster: Cluster, *, counts: ParameterCounts, devices: int
) -> tuple[list[Candidate], dict[str, int]]:
    found: list[Candidate] = []
    reasons: Counter[str] = Counter()
    for shape in _shapes(recipe, cluster, devices=devices):
        fitting = []
        for tried in shape:
            try:
                fit_mesh(tried, world_size=devices)
            except ValueError as error:
                reasons[str(error).splitlines()[0]] += 1
                continue
            memory = estimate_memory(tried, counts=counts, mesh=tried.mesh, cuda=cluster.cuda)
            if not fits(memory, cluster):
                reasons[_too_large(tried, cluster)] += 1
                continue
            time = predict(tried, cluster, counts=counts, mesh=tried.mesh)
            fitting.append(Candidate(tried, memory, time))
        if fitting:  # of the micro-batches that fit, the fastest
            found.append(min(fitting, key=_rank))
    found.sort(key=_rank)
    return found, dict(reasons.most_common())


def _rank(one: Candidate) -> tuple[float, int]:
    """The fastest first; of those as fast to four digits the one that takes least memory."""
    return float(f"{one.time.total:.4g}"), one.memory["total"]


def taken(memory: Mapping[str, int], *, cuda: bool) -> float:
    """Bytes of a device that a rank takes, of ``estimate_memory``: live tensors, allocator and process."""
    held = memory["total"] * FRAGMENTATION if cuda else memory["resident"]
    return held + RESERVED_BYTES[cuda]


def fits(memory: Mapping[str, int], cluster: Cluster) -> bool:
    """Whether a rank of ``memory`` has room on its device; always where the device's is not known."""
    return not cluster.memory_bytes or taken(memory, cuda=cluster.cuda) <= cluster.memory_bytes


def _too_large(recipe: Recipe, cluster: Cluster) -> str:
    training = recipe.training
    engine = f"ZeRO {training.zero_stage}" if training.engine == "deepspeed" else training.engine
    checkpointing = training.activation_checkpointing
    again = "no recomputation" if checkpointing == "none" else f"{checkpointing} recomputation"
    return f"more memory than the {cluster.memory_gb:.0f} GB of a device: {engine}, {again}"


def _shapes(recipe: Recipe, cluster: Cluster, *, devices: int) -> Iterator[list[Recipe]]:
    """The recipe on every mesh of ``devices``, with every engine and recomputation; one list of micro-batches
    each."""
    for sp, tp in _splits(cluster, devices=devices):
        dp = devices // (sp * tp)
        for engine, stage in _ENGINES:
            if (engine, stage) in (("deepspeed", 2), ("deepspeed", 3), ("fsdp2", 0)) and dp * sp == 1:
                continue  # nothing to divide among
            for checkpointing in _CHECKPOINTING:
                choices = _micro_batches(recipe.global_rows, dp)
                yield [
                    changed(
                        recipe,
                        dp=dp,
                        sp=sp,
                        tp=tp,
                        engine=engine,
                        zero_stage=stage,
                        micro_batch=rows,
                        checkpointing=checkpointing,
                    )
                    for rows in choices
                ]


def _splits(cluster: Cluster, *, devices: int) -> Iterator[tuple[int, int]]:
    """(sp, tp) that divide ``devices``; no group of tp ranks lies on two nodes."""
    for tp in _divisors(devices, limit=cluster.devices_per_node):
        if cluster.holds_groups(tp, ranks=devices):
            yield from ((sp, tp) for sp in _divisors(devices // tp, limit=devices))


def _micro_batches(global_rows: int, dp: int) -> list[int]:
    """Divisors of a replica's rows, up to ``_MOST_ROWS``; [1] where rows do not divide."""
    share = global_rows // dp
    return [1] if share < 1 or global_rows % dp else _divisors(share, limit=_MOST_ROWS)


def _divisors(number: int, *, limit: int) -> list[int]:
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def changed(
    recipe: Recipe,
    *,
    dp: int | None,
    sp: int,
    tp: int,
    engine: str,
    zero_stage: int,
    micro_batch: int,
    checkpointing: str,
) -> Recipe:
    """The recipe run another way; packing and Megatron's sequence parallelism follow the mesh."""
    training = dataclasses.replace(
        recipe.training,
        engine=engine,  # type: ignore[arg-type]
        zero_stage=zero_stage if engine == "deepspeed" else recipe.training.zero_stage,  # type: ignore[arg-type]
        micro_batch=micro_batch,
        activation_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    aligned = recipe.data.chunk_aligned or sp > 1
    split = recipe.tensor.sequence_parallel if tp == recipe.mesh.tp else tp > 1
    return dataclasses.replace(
        recipe,
        training=training,
        mesh=dataclasses.replace(recipe.mesh, dp=dp, sp=sp, tp=tp),
        data=dataclasses.replace(recipe.data, chunk_aligned=aligned),
        tensor=dataclasses.replace(recipe.tensor, sequence_parallel=split),
    )


def settings_of(recipe: Recipe) -> list[str]:
    """The ``--set`` arguments that make a recipe run this way, whatever mesh it names itself."""
    training, mesh = recipe.training, recipe.mesh
    found = [
        f"mesh.dp={mesh.dp}",
        f"mesh.sp={mesh.sp}",
        f"mesh.tp={mesh.tp}",
        f"training.engine={training.engine}",
        f"training.micro_batch={training.micro_batch}",
        f"training.activation_checkpointing={training.activation_checkpointing}",
    ]
    if training.engine == "deepspeed":
        found.insert(4, f"training.zero_stage={training.zero_stage}")
    if recipe.data.chunk_aligned:
        found.append("data.chunk_aligned=true")
    return [*found, f"tensor.sequence_parallel={str(recipe.tensor.sequence_parallel).lower()}"]
