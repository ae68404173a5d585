"""Export: the weights of a checkpoint as a folder of their own, read back after its hashes are checked.

model.safetensors  weights under their parameter names    tokenizer.model  what they were trained with
config.json        the model section of the recipe        export.json      source step, hashes of the others

checkpoints/hf_export.py writes the same for transformers, whose config.json then holds the section.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from checkpoints.logical import check_name
from checkpoints.manifest import records_from_json, records_to_json
from checkpoints.reader import CheckpointReader
from checkpoints.tensor_file import Entry, FileRecord, dtype_name, read_header, write_tensors
from checkpoints.verify import check_file
from trellis_dist.files import REAL, FileSystem, canonical_json, commit_directory, digest, read_json
from trellis_dist.models.huggingface.folder import MODEL_TYPE, PREFIX, SECTION

__all__ = [
    "EXPORT",
    "SAVED",
    "TOKENIZER",
    "Exported",
    "export_model",
    "load_exported",
    "verify_export",
    "write_export",
]

WEIGHTS, CONFIG, TOKENIZER, EXPORT = "model.safetensors", "config.json", "tokenizer.model", "export.json"
FORMAT, VERSION = "trellis-export", 1
SAVED = "model/"
# Names of files come from export.json, and lead nowhere else.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class Exported:
    """An exported folder: weights by parameter name, model section, tokenizer file, source step."""

    tensors: Mapping[str, Tensor]
    model_config: Mapping[str, Any]
    tokenizer: Path
    step: int


def export_model(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer: Path,
    model_config: Mapping[str, Any],
    file_system: FileSystem = REAL,
) -> Path:
    """Write the weights of `checkpoint`, its model section and tokenizer into the new folder `output`.

    The folder appears complete or not at all. Tensors are read and written one at a time.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: no checkpoint, or no tokenizer.
        ValueError: a damaged checkpoint (file named), or one without weights.
        OSError: the folder could not be written; nothing of it is left.
    """
    contents = {CONFIG: canonical_json(dict(model_config)).encode(), TOKENIZER: Path(tokenizer).read_bytes()}
    return write_export(CheckpointReader(checkpoint), output, contents=contents, file_system=file_system)


def write_export(
    reader: CheckpointReader,
    output: Path,
    *,
    contents: Mapping[str, bytes],
    prefix: str = "",
    file_system: FileSystem = REAL,
) -> Path:
    """Write the weights, `prefix` before their names, and the files `contents` into the folder `output`.

    Raises:
        FileExistsError, ValueError, OSError: as `export_model`.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists and is never overwritten: choose another folder or remove it")
    entries = [
        Entry(
            prefix + name.removeprefix(SAVED),
            dtype_name(reader.dtype(name)),
            reader.shape(name),
            partial(reader.read, name),
        )
        for name in reader.names()
        if name.startswith(SAVED)
    ]
    if not entries:
        raise ValueError(f"{reader.path} holds no weights (no tensor named {SAVED}...)")
    output.parent.mkdir(parents=True, exist_ok=True)
    attempt = output.with_name(f".{output.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        file_system.make_directory(attempt)
        records = {WEIGHTS: write_tensors(attempt / WEIGHTS, entries, file_system=file_system)}
        for name, data in contents.items():
            file_system.write(attempt / name, [data])
            records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        about = canonical_json(_about(reader, records)).encode()
        file_system.write(attempt / EXPORT, [about])
        commit_directory(attempt, output, file_system=file_system)
    except BaseException:
        file_system.remove_tree(attempt)
        raise
    return output


def _about(reader: CheckpointReader, records: Mapping[str, FileRecord]) -> dict[str, Any]:
    source = {"step": reader.step, "manifest_sha256": reader.manifest.digest}
    about = {"format": FORMAT, "version": VERSION, "source": source, "files": records_to_json(records)}
    return {**about, "digest": digest(about)}


def verify_export(directory: Path) -> int:
    """Compare every file with export.json; returns the source step. Raises as `load_exported`."""
    step, records = _read_about(directory / EXPORT)
    for name, record in records.items():
        check_file(directory / name, record, hashed=True)
    return step


def load_exported(directory: Path) -> Exported:
    """Read an exported folder; every file is verified before it is opened.

    Raises:
        FileNotFoundError: it is not an exported folder, or a file is missing.
        ValueError: a damaged or malformed file; the message names it.
    """
    step = verify_export(directory)
    names = [check_name(name) for name in read_header(directory / WEIGHTS)]
    with safe_open(directory / WEIGHTS, framework="pt", device="cpu") as file:
        # Cloned: the file may be removed while its tensors are in use.
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name).clone() for name in names}
    config = read_json(directory / CONFIG)
    if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE:
        config = config.get(SECTION)
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG} holds a {type(config).__name__}, not a model section")
    return Exported(tensors, config, directory / TOKENIZER, step)


def _read_about(path: Path) -> tuple[int, dict[str, FileRecord]]:
    """Source step and file records of export.json, which carries a digest of itself."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not an exported model: it has no {EXPORT}")
    about = read_json(path)
    try:
        claimed = about.pop("digest")
        if claimed != digest(about):
            raise ValueError("its digest does not match its contents")
        if (about["format"], about["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {about['format']!r} version {about['version']!r}")
        step, records = about["source"]["step"], records_from_json(about["files"])
        if type(step) is not int or not {WEIGHTS, CONFIG, TOKENIZER} <= {*records}:
            raise ValueError("source step or a file is missing")
        if strange := [name for name in records if not FILE_NAME.fullmatch(name)]:
            raise ValueError(f"file name {strange[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not {FORMAT} {VERSION}: {error!r}") from error
    return step, records
