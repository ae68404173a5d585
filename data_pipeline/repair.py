"""Make again what is damaged in a prepared data set, and nothing else.

A shard is written anew from the committed tokens; everything else, and a shard whose tokens are damaged too,
comes from `prepare`, which makes what is missing. Either way the hashes in the manifest must come out again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.job import locked, prepare
from data_pipeline.manifest import CONFIG, MANIFEST, SHARD, damaged_files, file_hashes, load_manifest
from data_pipeline.merge import remake_shard
from data_pipeline.rows import verify_row_index
from data_pipeline.workers import default_workers

__all__ = ["examine_dataset", "repair_dataset", "stored_config"]


def examine_dataset(directory: Path) -> dict[str, str]:
    """File name -> what is wrong with it; empty when every hash and count is right."""
    try:
        manifest = load_manifest(directory)
    except (OSError, ValueError) as error:
        return {MANIFEST: str(error)}
    found = damaged_files(directory, file_hashes(manifest), threads=default_workers())
    for path in sorted((directory / "index").glob("*.rows")):
        if (problem := verify_row_index(path)) is not None:
            found[f"index/{path.name}"] = problem
    return found


def repair_dataset(directory: Path, *, progress: bool = False) -> dict[str, str]:
    """Make the damaged files again.

    Args:
        directory: a data set, prepared once.
        progress: show what `prepare` does, where it is needed.

    Returns:
        What was wrong, as `examine_dataset`; the data set is whole now.

    Raises:
        ValueError, OSError: what `prepare` raises; or the corpus is another one now.
    """
    left = []
    with locked(directory):
        problems = examine_dataset(directory)
        for name in problems:
            stem = Path(name).stem
            if name.startswith("index/"):
                (directory / name).unlink()  # the loader, or `prepare`, makes it when it is wanted
            elif not (SHARD.fullmatch(stem) and remake_shard(directory, stem)):
                left.append(name)
    if left:
        _prepare_again(directory, left, progress=progress)
    if still := examine_dataset(directory):
        raise ValueError("; ".join(still.values()))
    return problems


def _prepare_again(directory: Path, names: list[str], *, progress: bool) -> None:
    config = stored_config(directory)
    try:
        before = load_manifest(directory).fingerprint
    except (OSError, ValueError):
        before = None
    aside = {directory / name: directory / f".{name}.damaged" for name in names}
    for path, damaged in aside.items():
        if path.exists():
            path.rename(damaged)
    try:
        made = prepare(config, progress=progress)
    except BaseException:
        for path, damaged in aside.items():
            if damaged.exists() and not path.exists():
                damaged.rename(path)
        raise
    for damaged in aside.values():
        damaged.unlink(missing_ok=True)
    if before is not None and made.fingerprint != before:
        raise ValueError(
            f"{directory}: the corpus or the code changed, so it is another data set now: fingerprint "
            f"{made.fingerprint}, was {before}; runs that began with the old one refuse it"
        )


def stored_config(directory: Path) -> DataConfig:
    """The config that the data set was prepared with, for the folder it is in now.

    Raises:
        ValueError: it is missing or damaged.
    """
    from pydantic import TypeAdapter, ValidationError

    path = directory / CONFIG
    try:
        config: DataConfig = TypeAdapter(DataConfig).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise ValueError(
            f"{path} is missing or damaged, so nothing can be made again from it: run `trellis prepare` with "
            "the data set's recipe"
        ) from error
    return replace(config, directory=str(directory))
