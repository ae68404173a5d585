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

from checkpoints.commit import list_steps, step_of
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
    "check_new_folder",
    "export_model",
    "load_exported",
    "unlisted_files",
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
        ValueError: a damaged checkpoint (file named), one without weights, an output among checkpoints.
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
    check_new_folder(output)
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


def check_new_folder(output: Path) -> None:
    """Check that `output` may be made: it is not there, and would not pass for one of a run's checkpoints.

    Raises:
        FileExistsError: it exists.
        ValueError: it has a step's name, or would lie in a checkpoint or in a folder of checkpoints.
    """
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists and is never overwritten: choose another folder or remove it")
    place = output.resolve()
    if step_of(place) is not None:
        raise ValueError(f"{output} has the name of a checkpoint: choose another name, such as export")
    if step_of(place.parent) is not None or list_steps(place.parent):
        raise ValueError(
            f"{output} would lie among checkpoints, which only a run writes: choose another folder"
        )


def _about(reader: CheckpointReader, records: Mapping[str, FileRecord]) -> dict[str, Any]:
    source = {"step": reader.step, "manifest_sha256": reader.manifest.digest}
    about = {"format": FORMAT, "version": VERSION, "source": source, "files": records_to_json(records)}
    return {**about, "digest": digest(about)}


def verify_export(directory: Path) -> int:
    """Compare every file with export.json; returns the source step. Raises as `load_exported`."""
    step, records = _read_about(directory / EXPORT)
    for name, record in records.items():
        if (directory / name).is_symlink():
            raise ValueError(
                f"{directory / name} is a link, as in the cache of the Hub, and links are refused: download "
                "with local_dir (hf download --local-dir), or copy the folder with links resolved (cp -rL)"
            )
        check_file(directory / name, record, hashed=True)
    return step


def unlisted_files(directory: Path) -> list[str]:
    """One line for each thing in the export `directory` that export.json does not list; sorted.

    It is no damage (a README, say), and `trellis import` does not read it; other programs may.

    Raises:
        FileNotFoundError, ValueError: as `load_exported`, of export.json.
    """
    listed = {EXPORT, *_read_about(directory / EXPORT)[1]}
    found = sorted(item for item in directory.iterdir() if item.name not in listed)
    return [f"{item} is not listed in {EXPORT}: it is no part of the export" for item in found]


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
