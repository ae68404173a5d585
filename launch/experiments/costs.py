"""What an experiment's runs will cost, and how far they are: known before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.ending import newest_step
from launch.experiments.perform import Workshop
from launch.experiments.pool import default_jobs
from launch.experiments.result import known_result
from launch.experiments.spec import RunSpec
from launch.recipe import Recipe

__all__ = ["Cost", "cost_lines", "costs"]

# Chunks of fewer tokens are a loop over nearly every token: docs/reproduce.md has a measured case.
FEW = 8


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run.

    Attributes:
        name: the run's.
        done: its result is there.
        steps_done, steps: of training.
        tokens: of the whole run.
        parameters: of its model.
        hours: that its training takes on this machine, by the planner's prediction (docs/planning.md); None
            where its mesh does not fit this machine. What is left: ``hours * (1 - steps_done / steps)``.
        at_least: chunks of so few tokens that it waits more than it computes: FLOPs predict too little.
    """

    name: str
    done: bool
    steps_done: int
    steps: int
    tokens: int
    parameters: int
    hours: float | None
    at_least: bool = False

    @property
    def left(self) -> float:
        """Share of the training that is left."""
        return 0.0 if self.done else 1.0 - self.steps_done / self.steps


def costs(shop: Workshop, specs: Sequence[RunSpec]) -> list[Cost]:
    """Of every run. Raises ValueError where a folder holds another run of its name."""
    return [_cost(shop, spec) for spec in specs]


def _cost(shop: Workshop, spec: RunSpec) -> Cost:
    from trellis_dist.models.counts import parameter_counts

    recipe = spec.resolved
    done = known_result(shop.result(spec), spec) is not None
    run_dir = shop.run_dir(spec)
    return Cost(
        name=spec.name,
        done=done,
        steps_done=min(newest_step(run_dir), recipe.training.steps) if run_dir.is_dir() else 0,
        steps=recipe.training.steps,
        tokens=recipe.tokens(),
        parameters=parameter_counts(recipe.model).total,
        hours=_hours(recipe),
        at_least="trellis" in recipe.model.pattern and recipe.model.trellis.chunk_size < FEW,
    )


def _hours(recipe: Recipe) -> float | None:
    import torch

    from launch.fit import fit_mesh, fit_to_devices
    from launch.planning.cluster import this_machine
    from launch.planning.step_time import predict
    from trellis_dist.models.counts import parameter_counts

    devices = torch.cuda.device_count()
    fitted = fit_to_devices(recipe, devices)
    ranks = fitted.mesh.world_size() or 1
    if ranks > max(devices, 1) and devices:
        return None
    mesh = fit_mesh(fitted, world_size=ranks)
    counts = parameter_counts(recipe.model)
    step = predict(fitted, this_machine(ranks=ranks), counts=counts, mesh=mesh).total
    return step * recipe.training.steps / 3600.0


def cost_lines(found: Sequence[Cost], *, jobs: int) -> list[str]:
    """A line per run, and what is left of all of them.

    Runs beyond one per core, or beyond one on a machine with a GPU, share what there is: they end no sooner.
    """
    lines = [f"{'run':<40} {'parameters':>11} {'tokens':>15} {'hours':>8}  state"]
    lines += [_line(cost) for cost in found]
    tokens = sum(cost.tokens * cost.left for cost in found)
    known = [cost.hours * cost.left for cost in found if cost.hours is not None]
    least = "at least " if any(cost.at_least and cost.left for cost in found) else ""
    total = sum(known) / min(jobs, default_jobs())
    hours = f"{least}{total:,.1f} hours on this machine, {jobs} at a time" if known else "hours unknown"
    missing = sum(not cost.done for cost in found)
    return [
        *lines,
        f"{missing} of {len(found)} runs are missing: {tokens:,.0f} tokens to train, {hours} (predicted by "
        "trellis plan's model from FLOPs: nothing was run; scoring not counted)",
    ]


def _line(cost: Cost) -> str:
    state = "done" if cost.done else f"step {cost.steps_done:,} of {cost.steps:,}" if cost.steps_done else "-"
    hours = "" if cost.hours is None else f"{'>' if cost.at_least else ''}{cost.hours:,.2f}"
    return f"{cost.name:<40} {cost.parameters:>11,} {cost.tokens:>15,} {hours:>8}  {state}"
