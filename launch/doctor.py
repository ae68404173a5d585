"""`trellis doctor`: is a checkpoint, a run, a data set or an export whole? Its hashes are compared.

Of a data set, what is damaged is also made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["examine"]


def examine(path: Path, *, repair: bool = False) -> dict[str, Any]:
    """What ``path`` is, what was examined, and every problem found (none: it is whole).

    Args:
        path: what to examine.
        repair: make the damaged files of a data set again, and nothing else.

    Returns:
        What ``trellis doctor PATH --json`` prints, always with these keys:

        - "path": as it was given. "kind": "checkpoint", "run", "dataset" or "export".
        - "examined": the paths whose bytes were compared; of a run its data set and each of its checkpoints.
        - "problems": one line per damage, naming the file; none: exit status 0, else 1.
        - "repaired": one line per file of a data set that was damaged and made again.
        - "notes": one line per thing worth knowing that is no damage: of a checkpoint or an export, files
          that it does not list; of a run also pins, and what unfinished saves and removals left.

    Raises:
        FileNotFoundError: no such path.
        ValueError: it is none of the four.
    """
    from checkpoints.commit import step_of

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    # Its own name or digest first: a stray file in it does not make a checkpoint something else.
    if step_of(path.resolve()) is not None or (path / "manifest.sha256").is_file():
        return _report(path, "checkpoint", {path: _checkpoint_problems(path)}, notes=_stray(path))
    if (path / "recipe.json").is_file():
        return _report(path, "run", _run_parts(path), notes=_run_notes(path))
    if (path / "export.json").is_file() or _is_bare_model(path):
        return _report(path, "export", {path: _export_problems(path)}, notes=_unlisted(path))
    if _is_dataset(path):
        return _repaired(path) if repair else _report(path, "dataset", {path: _dataset_problems(path)})
    if path.name.startswith("step-"):  # with its name and its digest lost, it is a damaged one
        return _report(path, "checkpoint", {path: _checkpoint_problems(path)}, notes=_stray(path))
    raise ValueError(
        f"{path} is no checkpoint (step-N), no run (recipe.json), no export (export.json) and no data "
        "set (manifest.json and *.idx)"
    )


def _report(
    path: Path, kind: str, parts: dict[Path, list[str]], *, notes: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "path": str(path),
        "kind": kind,
        "examined": [str(part) for part in parts],
        "problems": [line for problems in parts.values() for line in problems],
        "repaired": [],
        "notes": list(notes),
    }


def _repaired(path: Path) -> dict[str, Any]:
    from data_pipeline.repair import examine_dataset, repair_dataset

    found = examine_dataset(path)
    report = _report(path, "dataset", {path: []})
    if found:
        try:
            report["repaired"] = list(repair_dataset(path).values())
        except (ValueError, OSError) as error:
            report["problems"] = [*found.values(), f"cannot be made again: {error}"]
    return report


def _run_parts(run_dir: Path) -> dict[Path, list[str]]:
    from launch.run_folder import recipe_of_run

    parts: dict[Path, list[str]] = {}
    try:
        dataset = Path(recipe_of_run(run_dir).data.directory)
        parts[dataset] = _dataset_problems(dataset)
    except ValueError as error:
        parts[run_dir / "recipe.json"] = str(error).splitlines()
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    if not checkpoints:
        parts[run_dir / "checkpoints"] = [f"{run_dir / 'checkpoints'}: no checkpoint"]
    return parts | {checkpoint: _checkpoint_problems(checkpoint) for checkpoint in checkpoints}


def _is_dataset(path: Path) -> bool:
    """Token shards, or a manifest that is no checkpoint's."""
    if any(path.glob("*.idx")):
        return True
    step = path.name.startswith("step-") or (path / "manifest.sha256").is_file()
    return (path / "manifest.json").is_file() and not step


def _is_bare_model(path: Path) -> bool:
    """Whether `path` is a model of ours that transformers saved: an export without its list of hashes."""
    from checkpoints.source_folder import model_type
    from trellis_dist.models.huggingface.folder import MODEL_TYPE

    return model_type(path) == MODEL_TYPE


def _export_problems(path: Path) -> list[str]:
    from checkpoints.export import EXPORT, load_exported

    if not (path / EXPORT).is_file():
        return [f"{path}: no {EXPORT}: nothing to compare with; export again"]
    try:
        load_exported(path)
    except (ValueError, FileNotFoundError) as error:
        return [str(error)]
    return []


def _unlisted(path: Path) -> list[str]:
    from checkpoints.export import unlisted_files

    try:
        return unlisted_files(path)
    except (ValueError, OSError):  # without a whole list, which is a problem, nothing is unlisted
        return []


def _checkpoint_problems(path: Path) -> list[str]:
    from checkpoints.state import verify_checkpoint

    return verify_checkpoint(path)


def _stray(checkpoint: Path) -> list[str]:
    from checkpoints.verify import stray_files

    try:
        return stray_files(checkpoint)
    except (ValueError, OSError):  # without a whole manifest, which is a problem, nothing is stray
        return []


def _run_notes(run_dir: Path) -> list[str]:
    from checkpoints.commit import list_steps
    from checkpoints.verify import leftovers

    root = run_dir / "checkpoints"
    strays = [line for path in sorted(list_steps(root).values()) for line in _stray(path)]
    return [*strays, *leftovers(root)]


def _dataset_problems(path: Path) -> list[str]:
    from data_pipeline.repair import examine_dataset

    return list(examine_dataset(path).values())
