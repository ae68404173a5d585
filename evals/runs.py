"""From a run folder to a model that can be scored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.commit import list_steps, step_name, step_of
from checkpoints.export import EXPORT, load_exported
from checkpoints.state import CheckpointReader, latest_verified, load_run_state, verify_checkpoint
from data_pipeline.manifest import MANIFEST, Manifest, load_manifest
from data_pipeline.tokenizer import Tokenizer
from evals.config import Device
from evals.peer_codec import codec_of
from evals.subject import Subject
from trellis_dist.files import read_json, sha256_file
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model

if TYPE_CHECKING:
    import torch

__all__ = [
    "LoadedRun",
    "checkpoint_digest",
    "find_checkpoint",
    "find_dataset",
    "load_export",
    "load_run",
    "read_recipe",
    "resolve_device",
    "step_of_checkpoint",
]


@dataclass(frozen=True, kw_only=True)
class LoadedRun(Subject):
    """A checkpoint with everything that scoring it needs.

    Attributes:
        model: fp32, in evaluation mode.
        tokenizer: of the data set the run was trained on.
        recipe: the resolved recipe saved with the run.
        step: optimizer steps of the checkpoint.
        run_dir, dataset_dir, checkpoint: where things were read.
        data: fingerprint of the data set.
    """

    model: LanguageModel
    recipe: dict[str, Any]
    step: int
    run_dir: Path
    dataset_dir: Path
    checkpoint: Path
    data: str


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe of a run. Raises ValueError when the folder is no run, or its recipe is none."""
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run folder (it has no recipe.json): train first, or name another folder"
        )
    recipe = read_json(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no sections: it is no resolved recipe; train the run again")
    missing = [name for name in ("model", "data") if not isinstance(recipe.get(name), dict)]
    if missing:
        raise ValueError(
            f"{path} lacks the section {missing[0]!r}: it is no resolved recipe; train the run again"
        )
    return recipe


def find_checkpoint(run_dir: Path, *, step: int | None = None) -> Path:
    """The newest verified checkpoint of a run, or the one of ``step`` (verified too).

    Raises:
        ValueError: there is none, or the one asked for is damaged.
    """
    root = run_dir / "checkpoints"
    if step is None:
        found = latest_verified(root) if root.is_dir() else None
        if found is None:
            remedy = "restore one" if root.is_dir() and list_steps(root) else "train first"
            raise ValueError(f"{root} holds no verified checkpoint: {remedy}, or name another run")
        return found
    steps = list_steps(root)
    if step not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise ValueError(f"{root} has no checkpoint of step {step}: it has {have}")
    path = steps[step]
    if problems := verify_checkpoint(path):
        raise ValueError(f"{path} is damaged ({problems[0]}): choose another step")
    return path


def checkpoint_digest(checkpoint: Path) -> str:
    """Identity of a committed checkpoint: the hash of its manifest, which holds the hash of every file."""
    return sha256_file(checkpoint / "manifest.json")


def step_of_checkpoint(checkpoint: Path) -> int:
    """The step of a checkpoint that `find_checkpoint` or `list_steps` named."""
    step = step_of(checkpoint)
    assert step is not None, f"{checkpoint} is no checkpoint's name, {step_name(0)} is"
    return step


def find_dataset(
    run_dir: Path, checkpoint: Path, *, dataset_dir: Path | None = None
) -> tuple[Path, Manifest]:
    """The data set a checkpoint was trained on, by its fingerprint and its tokenizer's hash.

    Args:
        dataset_dir: where it lies now; None looks where the recipe says.

    Raises:
        FileNotFoundError: there is no data set in that folder.
        ValueError: it is another one, or its tokenizer is not the one it was prepared with.
    """
    folder = dataset_dir or _recorded_dataset(run_dir)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"the data set of {run_dir} is not in {folder}: move it back, or say where it is now "
            "with --dataset-dir FOLDER"
        )
    manifest = load_manifest(folder)
    trained = _trained_on(checkpoint)
    if manifest.fingerprint != trained:
        raise ValueError(
            f"{folder} holds the data set {manifest.fingerprint}, but {checkpoint} was trained on {trained}: "
            "restore that data set, or name its folder with --dataset-dir"
        )
    tokenizer = folder / "tokenizer.model"
    if (found := sha256_file(tokenizer)) != (expected := manifest.tokenizer["sha256"]):
        raise ValueError(
            f"{tokenizer} has sha256 {found}, but the data set was prepared with {expected}: "
            "restore the file, or run `trellis prepare` again"
        )
    return folder, manifest


def _recorded_dataset(run_dir: Path) -> Path:
    """Where the recipe says that the data set lies. Raises ValueError when it does not."""
    folder = read_recipe(run_dir)["data"].get("directory")
    if not isinstance(folder, str):
        raise ValueError(
            f"{run_dir / 'recipe.json'}: data.directory = {folder!r} names no folder: train the run again, "
            "or say where the data set is with --dataset-dir FOLDER"
        )
    return Path(folder)


def _trained_on(checkpoint: Path) -> str:
    """Fingerprint of the data set. Raises ValueError when the checkpoint does not say."""
    data = load_run_state(checkpoint).get("data")
    fingerprint = data.get("fingerprint") if isinstance(data, dict) else None
    if not isinstance(fingerprint, str):
        raise ValueError(
            f"{checkpoint} does not say what data it was trained on (data.fingerprint of its run state): "
            "choose another step, or train the run again"
        )
    return fingerprint


def load_run(
    run_dir: Path, *, step: int | None = None, device: Device = "auto", dataset_dir: Path | None = None
) -> LoadedRun:
    """Build a run's model and fill it from a checkpoint.

    Args:
        run_dir: RUN, with recipe.json and checkpoints/.
        step: a saved step; None takes the newest verified one.
        device: "auto" takes a CUDA device when there is one.
        dataset_dir: where the run's data set lies now; None looks where the recipe says.

    Raises:
        ValueError: no run, no verified checkpoint, another data set than the one it was trained on, or
            weights that do not fit the recipe's model.
        OSError: the data set is not there or cannot be read.
    """
    recipe = read_recipe(run_dir)
    checkpoint = find_checkpoint(run_dir, step=step)
    folder, manifest = find_dataset(run_dir, checkpoint, dataset_dir=dataset_dir)
    reader = CheckpointReader(checkpoint)
    saved = {name.removeprefix("model/") for name in reader.names() if name.startswith("model/")}
    model = _build(recipe["model"], saved, lambda name: reader.read(f"model/{name}"), device)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    return LoadedRun(
        name=str(recipe.get("name", run_dir.name)),
        model=model,
        tokenizer=codec_of(tokenizer),
        tokenizer_digest=tokenizer.sha256,
        device=next(model.parameters()).device,
        recipe=recipe,
        step=step_of_checkpoint(checkpoint),
        run_dir=run_dir,
        dataset_dir=folder,
        checkpoint=checkpoint,
        data=manifest.fingerprint,
        digest=checkpoint_digest(checkpoint),
    )


def resolve_device(device: Device) -> str:
    """ "cpu" or "cuda". Raises ValueError for "cuda" without a CUDA device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('evals.device = "cuda" but torch sees no CUDA device: use "cpu" or "auto"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_export(path: Path, *, device: Device = "auto") -> Subject:
    """The model of a folder that `trellis export` wrote, in fp32; it needs no data set.

    Raises:
        ValueError, OSError: as `checkpoints.export.load_exported`, or no such device.
    """
    exported = load_exported(path)
    weights, tokenizer = exported.tensors, Tokenizer.load(exported.tokenizer)
    model = _build(exported.model_config, weights, weights.__getitem__, device)
    return Subject(
        name=path.resolve().name,
        model=model,
        tokenizer=codec_of(tokenizer),
        digest=sha256_file(path / EXPORT),  # which holds the hash of every file
        tokenizer_digest=tokenizer.sha256,
        device=next(model.parameters()).device,
    )


def _build(
    section: Mapping[str, Any], saved: Collection[str], read: Callable[[str], torch.Tensor], device: Device
) -> LanguageModel:
    """The model of a recipe's section with every parameter copied from what was saved."""
    import torch
    from pydantic import TypeAdapter

    config = TypeAdapter(ModelConfig).validate_python(dict(section))
    model = build_language_model(config, seed=0, device=resolve_device(device))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in saved:
                raise ValueError(
                    f"no weights were saved for {name}: they do not belong to this model section"
                )
            value = read(name)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} was saved as {list(value.shape)} and is {list(parameter.shape)} in the model "
                    "section: they do not belong together"
                )
            parameter.copy_(value)
    return model.eval()
