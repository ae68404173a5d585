"""One rank of `benchmarks.plan_memory`: trains two steps and prints what memory they took, as JSON.

Resident: what the process held at most while its engine was built and in its second step, above what it held
after its imports and the rendezvous. Live: bytes of tensors at the most, from torch's record of every
allocation (in a second engine, built after the first is gone, because the record takes memory itself).

Kept: the same of the engine's build and four steps, with nothing handed back between them, as in training.

    python -m benchmarks.plan_memory_rank RECIPE_JSON RANK WORLD_SIZE PORT [kept]
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.local_ranks import join

if TYPE_CHECKING:
    from launch.recipe import Recipe

__all__ = ["live_peaks", "main", "measure", "measure_kept"]

STEPS = 4  # of what is kept; the peak still grows in the second
PHASES = ("build", "forward", "backward", "reduce", "update")


def measure(recipe: Recipe, *, rank: int) -> dict[str, Any]:
    """Peaks in bytes of this rank: {"resident", "live", "phases"}."""
    from benchmarks.kernels.memory import _reset_peak, _status

    before = _reset_peak()
    engine = build(recipe)
    built = _status("VmHWM") - before
    batches = make_rows(recipe, rank=rank)
    step(engine, batches)
    _reset_peak()
    step(engine, batches)
    found = {"resident": _status("VmHWM") - before, "resident_build": built}
    del engine
    gc.collect()
    phases = live_peaks(recipe, batches)
    return {**found, "live": max(phases[name] for name in PHASES if name != "build"), "live_phases": phases}


def measure_kept(recipe: Recipe, *, rank: int) -> dict[str, Any]:
    """Peaks in bytes of this rank, as the allocator of its environment lets them grow.

    {"kept": the highest, "kept_steps": as far as each step had brought it}.
    """
    from benchmarks.kernels.memory import _reset_peak, _status

    before = _reset_peak()
    engine = build(recipe)
    batches = make_rows(recipe, rank=rank)
    peaks = []
    for _ in range(STEPS):
        step(engine, batches)
        peaks.append(_status("VmHWM") - before)
    return {"kept": peaks[-1], "kept_steps": peaks}


def build(recipe: Recipe) -> Any:
    """The recipe's engine on this process group."""
    from trellis_dist.models.language_model import build_language_model
    from trellis_dist.parallel.apply import apply_parallelism
    from trellis_dist.parallel.mesh import build_mesh
    from trellis_dist.training.engines.factory import build_engine

    mesh = build_mesh(recipe.mesh, tensor=recipe.tensor, sequence=recipe.sequence, device="cpu")
    model = build_language_model(recipe.model, seed=0)
    mode = recipe.training.activation_checkpointing
    segments = apply_parallelism(model, mesh, recompute=mode)
    return build_engine(model, recipe.training, optimizer=recipe.optimizer, mesh=mesh, segments=segments)


def make_rows(recipe: Recipe, *, rank: int) -> list[Any]:
    """The rank's micro-batches of one step: whole rows of random tokens, one document each."""
    from benchmarks.sequence_parallel.subject import make_batches

    accumulation = recipe.global_rows // (recipe.training.micro_batch * (recipe.mesh.dp or 1))
    replica = rank // (recipe.mesh.sp * recipe.mesh.tp)
    return make_batches(
        recipe.model.vocab_size,
        rows=recipe.training.micro_batch,
        length=recipe.data.sequence_length,
        micro_batches=accumulation,
        seed=replica,
    )


def step(engine: Any, batches: list[Any]) -> None:
    """One update."""
    valid = sum(batch.valid_tokens for batch in batches)
    assert engine.train_step(batches, lr=1e-4, valid_tokens=valid).applied, "the step was skipped"


def live_peaks(recipe: Recipe, batches: list[Any]) -> dict[str, int]:
    """Most live tensor bytes while the engine is built, and in each phase of its second step."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    def mark(name: str) -> None:
        with record_function(f"phase:{name}"):
            pass

    # One record from before the first tensor, so that nothing that is freed was made unseen.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        mark("build")
        engine = build(recipe)
        mark("first")
        step(engine, batches)
        _mark_phases(engine, mark)
        step(engine, batches)
        mark("end")
        torch.zeros(1)
    return peaks_by_phase(record.profiler.kineto_results.experimental_event_tree())


def _mark_phases(engine: Any, mark: Any) -> None:
    """Have the engine's own announcements, and the loss, cut the step."""
    names = {
        "forward and backward passes": "forward",
        "sum of the losses": "backward",
        "reduction of the gradients": "reduce",
    }
    engine.enter = lambda what: mark(names.get(what, "update"))
    real = engine._backward

    def backward(loss: Any, *, last: bool) -> None:
        mark("backward")
        real(loss, last=last)
        if not last:
            mark("forward")

    engine._backward = backward


def peaks_by_phase(roots: Any) -> dict[str, int]:
    """Most bytes alive between one mark and the next, by the mark's name.

    By address: what gloo's threads free is not in the record, but its place is soon given to another tensor.
    """
    peaks: dict[str, int] = {}
    alive: dict[int, int] = {}
    live, phase = 0, "none"
    for _, name, place, size in sorted(_changes(roots)):
        phase = name or phase
        if place:
            live -= alive.pop(place, 0)
        if size > 0:
            live += size
            alive[place] = size
        peaks[phase] = max(peaks.get(phase, 0), live)
    return peaks


def _changes(roots: Any) -> Iterator[tuple[int, str, int, int]]:
    """(time, mark, 0, 0) and (time, "", address, bytes; negative where they are freed)."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            yield event.start_time_ns, "", fields.ptr, fields.alloc_size
        elif event.name.startswith("phase:"):
            yield event.start_time_ns, event.name.removeprefix("phase:"), 0, 0


def main() -> None:
    """Join, measure, print."""
    source, rank, world_size, port = sys.argv[1], *map(int, sys.argv[2:5])
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch.profiler", "launch.recipe", "megatron.core.parallel_state", "deepspeed"):
            importlib.import_module(name)
        for name in ("local", "deepspeed", "fsdp2"):
            importlib.import_module(f"trellis_dist.training.engines.{name}")
        importlib.import_module("benchmarks.sequence_parallel.subject")
    from launch.recipe import parse_recipe

    recipe = parse_recipe(json.loads(source), source="benchmark")
    join(rank, world_size, port, timeout_s=600.0)
    measured = measure_kept if sys.argv[5:] == ["kept"] else measure
    print("FOUND " + json.dumps(measured(recipe, rank=rank)), flush=True)


if __name__ == "__main__":
    main()
