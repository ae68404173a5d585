"""Import: weights from outside as a checkpoint to start from.

FOLDER/step-00000000  the weights, no optimizer state     model.toml   the recipe's [model] section
FOLDER/import.json    where each tensor came from

A folder that an export wrote, or `save_pretrained` of transformers after it, comes back bit for bit; other
transformers are turned into a Trellis by checkpoints/from_llama.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.export import EXPORT, check_new_folder, verify_export
from checkpoints.logical import LogicalTensor
from checkpoints.source_folder import SourceFolder, checked_section
from checkpoints.state import save_checkpoint
from checkpoints.tensor_file import DTYPES
from trellis_dist.files import REAL, FileSystem, canonical_json, commit_directory
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.huggingface.folder import MODEL_TYPE, PREFIX, SECTION
from trellis_dist.models.language_model import LanguageModel

__all__ = ["Imported", "import_folder", "write_import"]

MODEL_FILE, REPORT = "model.toml", "import.json"


@dataclass(frozen=True)
class Imported:
    """Weights to start from.

    Attributes:
        config: the model that they fit.
        tensors: parameter -> values.
        mapped: parameter -> the source's tensor that it was made from.
        fresh: parameter -> how it was initialised, of those the source has no counterpart for.
        unmapped: tensor or setting of the source -> why nothing was made of it.
        notes: what else to know.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    mapped: Mapping[str, str]
    fresh: Mapping[str, str] = field(default_factory=dict)
    unmapped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def import_folder(directory: Path) -> Imported:
    """The weights of a folder written by `trellis export`, in either format, or saved again by transformers.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: another model's folder, a damaged or malformed file, weights that do not fit the section.
    """
    if (Path(directory) / EXPORT).is_file():
        verify_export(Path(directory))
    source = SourceFolder(directory)
    kind = source.config.get("model_type")
    exported = kind is None and (source.directory / EXPORT).is_file()
    if kind != MODEL_TYPE and not exported:
        raise ValueError(
            f"{source.directory / 'config.json'} has model_type {kind!r}, not {MODEL_TYPE!r}: "
            "`trellis import --from-transformer` converts a Llama"
        )
    section = source.config if exported else source.config.get(SECTION)
    if not isinstance(section, dict):
        raise ValueError(f"{source.directory / 'config.json'} has no table {SECTION}: it is damaged")
    config = checked_section(section, source=str(source.directory / "config.json"))
    if config.num_layers > len(source.files):  # before a model of so many layers is made
        raise ValueError(f"{source.directory} has {len(source.files)} tensors for {config.num_layers} layers")
    names = {name.removeprefix(PREFIX): name for name in source.files}
    expected = parameter_shapes(config, source=source.directory)
    if different := sorted(names.keys() ^ expected.keys()):
        where = "has no" if different[0] in expected else "has a strange"
        raise ValueError(f"{source.directory} {where} tensor {different[0]}: it does not fit its config.json")
    for name, shape in expected.items():
        check_shape(name, source.header(names[name]), shape, source=source.directory)
    tensors = {name: source.read(names[name]) for name in expected}
    return Imported(config, tensors, mapped={name: names[name] for name in expected})


def parameter_shapes(config: ModelConfig, *, source: Path) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape of the model; no memory is taken for it. Raises ValueError: beyond any memory."""
    try:
        with torch.device("meta"):
            model = LanguageModel(config)
    except (RuntimeError, TypeError) as error:  # a number of bytes, or a size, beyond 63 bits
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: config.json asks for a model beyond any memory ({reason})") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shape(
    name: str, header: tuple[str, tuple[int, ...]], shape: tuple[int, ...], *, source: Path
) -> None:
    """Raises ValueError: `header`, for parameter `name`, is not floating-point or not of `shape`."""
    dtype, found = header
    if found != shape or not DTYPES[dtype].is_floating_point:
        raise ValueError(
            f"{source}: {name} would be {dtype} {list(found)}, and config.json asks for "
            f"floating-point {list(shape)}: they do not belong together"
        )


def write_import(imported: Imported, output: Path, *, source: Path, file_system: FileSystem = REAL) -> Path:
    """Write the checkpoint of step 0, model.toml and import.json into the new folder `output`.

    The folder appears complete or not at all.

    Raises:
        FileExistsError: `output` exists.
        ValueError: it would lie among checkpoints.
        OSError: it could not be written; nothing of it is left.
    """
    check_new_folder(output)
    section = json.loads(json.dumps(dataclasses.asdict(imported.config)))
    report = {
        "source": str(source),
        **{key: dict(getattr(imported, key)) for key in ("mapped", "fresh", "unmapped")},
        "notes": list(imported.notes),
    }
    tensors = [LogicalTensor.whole(f"model/{name}", value) for name, value in imported.tensors.items()]
    state = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "skipped": 0,
        "model": section,
        "imported_from": str(source),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    attempt = output.with_name(f".{output.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        file_system.make_directory(attempt)
        save_checkpoint(attempt, step=0, tensors=tensors, run_state=state, file_system=file_system)
        # Spelled out: laid over a recipe that sets a width, leaving it out would mean that one.
        recipe = model_toml({**section, "mlp_hidden": imported.config.mlp_width})
        file_system.write(attempt / MODEL_FILE, [recipe.encode()])
        file_system.write(attempt / REPORT, [canonical_json(report).encode()])
        commit_directory(attempt, output, file_system=file_system)
    except BaseException:
        file_system.remove_tree(attempt)
        raise
    return output


def model_toml(section: Mapping[str, Any]) -> str:
    """`section` as the [model] section of a recipe; TOML has no None, so such a key is left out."""
    lines: list[str] = []

    def table(name: str, values: Mapping[str, Any]) -> None:
        lines.append(f"[{name}]")
        inner = {key: value for key, value in values.items() if isinstance(value, Mapping)}
        for key, value in values.items():
            if key not in inner and value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
        for key, value in inner.items():
            lines.append("")
            table(f"{name}.{key}", value)

    table("model", section)
    return "\n".join(lines) + "\n"
