"""What is checked before ranks start: each check is cheap, real, and says what to change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.config import CheckpointConfig
from launch.fit import fit_mesh, fit_to_devices, what_was_fitted
from launch.ranks import under_torchrun
from launch.recipe import Recipe

__all__ = [
    "check_dataset",
    "check_disk",
    "check_machine",
    "check_run_folder",
    "check_source",
    "check_writable",
    "checkpoint_bytes",
    "fit_to_machine",
    "local_ranks",
    "most_kept",
]


def fit_to_machine(recipe: Recipe, *, say: Callable[[str], None]) -> Recipe:
    """The recipe with an open ``mesh.dp`` fitted to the ranks there are, or else to this machine's devices.

    Ranks are there under torchrun. ``say`` takes a line when that changed more than ``mesh.dp``.
    """
    import torch

    devices = int(os.environ["WORLD_SIZE"]) if under_torchrun() else torch.cuda.device_count()
    fitted = fit_to_devices(recipe, devices)
    if line := what_was_fitted(recipe, fitted, devices=devices):
        say(line)
    return fitted


def check_machine(recipe: Recipe, run_dir: Path, *, say: Callable[[str], None] | None = None) -> int:
    """Check devices, run folder, disk, memory, where checkpoints are uploaded and what scoring reads.

    ``say`` takes a line where the planner thinks that memory will not do; it is refused only where weights
    and optimizer state alone are more than a GPU holds.

    Returns:
        The ranks to start on this machine.

    Raises:
        ValueError, OSError: one of them does not do; the message says what to change.
    """
    from checkpoints.upload import check_store
    from evals.evaluate import check_eval_inputs
    from launch.planning.advice import check_memory

    ranks = local_ranks(recipe)
    check_run_folder(recipe, run_dir)
    if (line := check_memory(recipe, ranks=ranks)) and say is not None:
        say(line)
    if recipe.checkpoint.upload:
        check_store(recipe.checkpoint.upload)
    check_eval_inputs(recipe.evals)
    return ranks


def local_ranks(recipe: Recipe) -> int:
    """Ranks to start on this machine: what the mesh names, otherwise what fits its devices.

    Raises:
        ValueError: the mesh does not fit the devices of this machine, or its batch does not divide.
    """
    import torch

    devices = torch.cuda.device_count()
    fitted = fit_to_devices(recipe, devices)
    count = fitted.mesh.world_size() or 1
    if devices and count > devices:
        raise ValueError(
            f"the mesh needs {count} ranks, one per CUDA device, but this machine has {devices}: "
            "change mesh.dp or mesh.sp, or start on several machines with launch/torchrun/train.sh"
        )
    fit_mesh(fitted, world_size=count)
    return count


def check_run_folder(recipe: Recipe, run_dir: Path) -> None:
    """Raise ``OSError`` unless the run folder is writable and what is kept of the run fits on its disk."""
    check_writable(run_dir)
    kept = most_kept(recipe.checkpoint, steps=recipe.training.steps)
    check_disk(run_dir, checkpoint_bytes=checkpoint_bytes(recipe), kept=kept)


def check_writable(run_dir: Path) -> None:
    """Raise ``OSError`` unless a file can be written in the run folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # all nodes try it at the same time
    except OSError as error:
        raise OSError(
            f"the run folder {run_dir} is not writable ({error.strerror}): use another --run-dir"
        ) from None


def most_kept(config: CheckpointConfig, *, steps: int) -> int:
    """Checkpoints that retention can have kept by the last of ``steps``, pinned ones not counted."""
    saves = -(-steps // config.interval)
    if config.keep == 0:
        return saves
    every = steps // config.keep_every if config.keep_every else 0
    return min(saves, config.keep + config.keep_best + every)


def check_disk(run_dir: Path, *, checkpoint_bytes: int, kept: int) -> None:
    """Raise ``OSError`` unless the ``kept`` checkpoints of a run, and the one being written, fit on its disk.

    Those that are there already take no more room: each new one replaces one of them.
    """
    present = len(list((run_dir / "checkpoints").glob("step-*")))
    copies = max(1, kept + 1 - present)
    needed = checkpoint_bytes * copies
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise OSError(
            f"{run_dir} has {free / 1e9:.1f} GB free, but {copies} checkpoints need {needed / 1e9:.1f} GB: "
            "free some space, keep fewer (checkpoint.keep, keep_every, keep_best), or use another --run-dir"
        )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint: weights, fp32 masters where weights are bf16, and AdamW's two fp32 moments."""
    from trellis_dist.models.counts import parameter_counts

    half = recipe.training.precision == "bf16" and recipe.training.engine != "fsdp2"
    moments = 8 if recipe.optimizer.kind == "adamw" else 0
    return parameter_counts(recipe.model).total * ((2 + 4 if half else 4) + moments)


def check_dataset(recipe: Recipe) -> None:
    """Raise ``FileNotFoundError`` unless token shards are there to train on."""
    directory = Path(recipe.data.directory)
    if not (directory / "manifest.json").is_file():
        raise FileNotFoundError(
            f"no token shards in {directory} (data.directory): run `trellis prepare` with the same arguments "
            "first"
        )


def check_source(recipe: Recipe) -> None:
    """Raise ``ValueError`` for a download without a pinned revision, ``FileNotFoundError`` for no corpus."""
    for problem in _source_problems(recipe):
        raise problem


def _source_problems(recipe: Recipe) -> Iterator[Exception]:
    for name, source in recipe.data.sources.items():
        key = f"data.mixture.{name}" if recipe.data.mixture else "data.source"
        if source.kind == "huggingface" and not source.revision:
            yield ValueError(
                f"{key}.name = {source.name!r} has no pinned revision, so its text may change: "
                f"give --corpus {source.name}@COMMIT or --set {key}.revision=COMMIT"
            )
        if source.kind == "path" and source.path and not Path(source.path).exists():
            yield FileNotFoundError(
                f"{key}.path = {source.path!r}: no such file or folder; "
                "give one with .txt, .jsonl(.gz, .zst) or .parquet files"
            )
