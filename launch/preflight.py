"""What is checked before ranks start: each check is cheap, real, and says what to change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.recipe import Recipe, fit_mesh

__all__ = ["check_dataset", "check_disk", "check_source", "check_writable", "local_ranks"]


def local_ranks(recipe: Recipe) -> int:
    """Ranks to start on this machine: what the mesh names, otherwise one per CUDA device.

    Raises:
        ValueError: the mesh does not fit the devices of this machine, or its batch does not divide.
    """
    import torch

    devices = torch.cuda.device_count()
    inner = recipe.mesh.sp * recipe.mesh.tp
    replicas = 1 if recipe.training.engine == "local" else max(1, devices // inner)
    count = recipe.mesh.world_size() or replicas * inner
    if devices and count > devices:
        raise ValueError(
            f"the mesh needs {count} ranks, one per CUDA device, but this machine has {devices}: "
            "change mesh.dp or mesh.sp, or start on several machines with launch/torchrun/train.sh"
        )
    fit_mesh(recipe, world_size=count)
    return count


def check_writable(run_dir: Path) -> None:
    """Raise ``OSError`` unless a file can be written in the run folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"the run folder {run_dir} is not writable ({error.strerror}): use another --run-dir"
        ) from None


def check_disk(run_dir: Path, *, checkpoint_bytes: int, kept: int) -> None:
    """Raise ``OSError`` unless the checkpoints a run keeps, and the one being written, fit on its disk."""
    copies = max(kept, 1) + 1
    needed = checkpoint_bytes * copies
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise OSError(
            f"{run_dir} has {free / 1e9:.1f} GB free, but {copies} checkpoints need {needed / 1e9:.1f} GB: "
            "free some space, lower checkpoint.keep, or use another --run-dir"
        )


def check_dataset(recipe: Recipe) -> None:
    """Raise ``FileNotFoundError`` unless token shards are there to train on."""
    directory = Path(recipe.data.directory)
    if not (directory / "manifest.json").is_file():
        raise FileNotFoundError(
            f"no token shards in {directory} (data.directory): run `trellis prepare {recipe.name}` first"
        )


def check_source(recipe: Recipe) -> None:
    """Raise ``ValueError`` for a download without a pinned revision, ``FileNotFoundError`` for no corpus."""
    for problem in _source_problems(recipe):
        raise problem


def _source_problems(recipe: Recipe) -> Iterator[Exception]:
    source = recipe.data.source
    if source.kind == "huggingface" and not source.revision:
        yield ValueError(
            f"data.source.name = {source.name!r} has no pinned revision, so its text may change: "
            f"give --corpus {source.name}@COMMIT or --set data.source.revision=COMMIT"
        )
    if source.kind == "path" and source.path and not Path(source.path).exists():
        yield FileNotFoundError(
            f"data.source.path = {source.path!r}: no such file or folder; "
            "give one with .txt, .jsonl(.gz, .zst) or .parquet files"
        )
