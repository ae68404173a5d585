"""The manifest of a checkpoint: tensor -> slices -> files, and the size and SHA-256 of every file.

Nothing of a checkpoint is parsed before `manifest.sha256` agrees with `manifest.json`, and no file is opened
before it agrees with the manifest. A manifest is data from outside: every field is checked, and its file
names match fixed patterns, so it cannot point outside its directory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.logical import Box, check_cover, check_name
from checkpoints.tensor_file import DTYPES, FileRecord
from trellis_dist.files import canonical_json, read_json

__all__ = [
    "DIGEST_FILE",
    "MANIFEST_FILE",
    "STATE_FILE",
    "Manifest",
    "RankPart",
    "TensorRecord",
    "TensorSlice",
    "assemble",
    "description_file",
    "digest_line",
    "load_manifest",
    "records_from_json",
    "records_to_json",
    "tensor_file",
]

MANIFEST_FILE, DIGEST_FILE, STATE_FILE = "manifest.json", "manifest.sha256", "state.json"
FORMAT, VERSION = "trellis-checkpoint", 1
MAX_MANIFEST = 256 << 20
FILE_NAME = re.compile(r"state\.json|rank-[0-9]{5}\.json|rank-[0-9]{5}(-[0-9]{3,5})?\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
DIGEST_LINE = re.compile(rf"({SHA256.pattern})  {re.escape(MANIFEST_FILE)}\n")


@dataclass(frozen=True)
class TensorSlice:
    """Where one box of a tensor is stored: the tensor `key` of safetensors file `file`."""

    file: str
    key: str
    box: Box

    def to_json(self) -> dict[str, Any]:
        """As the manifest spells it."""
        box = {"offset": list(self.box.offset), "shape": list(self.box.shape)}
        return {"file": self.file, "key": self.key, **box}

    @classmethod
    def from_json(cls, value: Any) -> TensorSlice:
        """Checked inverse of `to_json`. Raises ValueError, KeyError or TypeError."""
        if not FILE_NAME.fullmatch(value["file"]) or not value["file"].endswith(".safetensors"):
            raise ValueError(f"file name {value['file']!r} is not one a checkpoint has")
        if not isinstance(value["key"], str):
            raise ValueError(f"key {value['key']!r} is not a string")
        return cls(value["file"], value["key"], Box(_integers(value["offset"]), _integers(value["shape"])))


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor: dtype (safetensors name), global shape, and the slices that tile it."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]

    def to_json(self) -> dict[str, Any]:
        """As the manifest spells it."""
        slices = [part.to_json() for part in self.slices]
        return {"dtype": self.dtype, "shape": list(self.shape), "slices": slices}

    @classmethod
    def from_json(cls, value: Any) -> TensorRecord:
        """Checked inverse of `to_json`. Raises ValueError, KeyError or TypeError."""
        if value["dtype"] not in DTYPES:
            raise ValueError(f"dtype {value['dtype']!r} is none of {', '.join(DTYPES)}")
        slices = tuple(TensorSlice.from_json(part) for part in value["slices"])
        return cls(value["dtype"], _integers(value["shape"]), slices)


@dataclass(frozen=True)
class RankPart:
    """What one rank wrote: its safetensors files and the slices in them."""

    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]

    def to_json(self) -> dict[str, Any]:
        """As `rank-XXXXX.json` spells it."""
        return {
            "files": records_to_json(self.files),
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> RankPart:
        """Checked inverse of `to_json`. Raises ValueError, KeyError or TypeError."""
        files = records_from_json(value["files"])
        for name in files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"file name {name!r} is not one a checkpoint has")
        tensors = value["tensors"].items()
        return cls(files, {check_name(name): TensorRecord.from_json(record) for name, record in tensors})


@dataclass(frozen=True)
class Manifest(RankPart):
    """A whole checkpoint; `digest` is the SHA-256 of its manifest.json ("" before it is written)."""

    step: int
    world_size: int
    digest: str = ""

    @functools.cached_property
    def slices_by_file(self) -> dict[str, list[tuple[str, TensorSlice]]]:
        """Tensor file -> (tensor, slice) of all it holds."""
        found: dict[str, list[tuple[str, TensorSlice]]] = {}
        for name, record in self.tensors.items():
            for part in record.slices:
                found.setdefault(part.file, []).append((name, part))
        return found

    def to_json(self) -> dict[str, Any]:
        """As manifest.json spells it."""
        head = {"format": FORMAT, "version": VERSION, "step": self.step, "world_size": self.world_size}
        return {**head, **super().to_json()}

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json."""
        return canonical_json(self.to_json()).encode()


def records_to_json(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    """File records as JSON: name -> size and digest."""
    return {name: {"bytes": record.size, "sha256": record.sha256} for name, record in records.items()}


def records_from_json(value: Any) -> dict[str, FileRecord]:
    """Checked inverse of `records_to_json`; names are not judged. Raises ValueError, KeyError, TypeError."""
    return {name: _file_record(record) for name, record in value.items()}


def description_file(rank: int) -> str:
    """Name of a rank's description of its tensor files."""
    return f"rank-{rank:05d}.json"


def tensor_file(rank: int, index: int) -> str:
    """Name of a rank's tensor file number `index`."""
    return f"rank-{rank:05d}-{index:03d}.safetensors" if index else f"rank-{rank:05d}.safetensors"


def digest_line(manifest: bytes) -> bytes:
    """The bytes of manifest.sha256, as `sha256sum` prints them."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_FILE}\n".encode()


def assemble(directory: Path, *, step: int, world_size: int, state: FileRecord) -> Manifest:
    """Put the ranks' descriptions in `directory` together into a manifest.

    A box that several ranks wrote (a replicated tensor) is taken from the first of them.

    Raises:
        ValueError: ranks disagree about a tensor, their slices overlap or leave a hole, or a file has not
            the size that its rank wrote.
        OSError: a rank's description or tensor file is missing.
    """
    files = {STATE_FILE: state}
    tensors: dict[str, TensorRecord] = {}
    for rank in range(world_size):
        description = directory / description_file(rank)
        part = RankPart.from_json(read_json(description))
        data = description.read_bytes()
        files[description.name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        for name, wrote in part.files.items():
            held = (directory / name).stat().st_size
            if held != wrote.size:
                raise ValueError(f"{directory / name} has {held} bytes, rank {rank} wrote {wrote.size}")
        files.update(part.files)
        for name, record in part.tensors.items():
            tensors[name] = _merge(name, tensors.get(name), record)
    for name, record in tensors.items():
        check_cover(name, record.shape, [part.box for part in record.slices])
    return Manifest(files, tensors, step, world_size)


def _merge(name: str, known: TensorRecord | None, new: TensorRecord) -> TensorRecord:
    if known is None:
        return new
    if (known.dtype, known.shape) != (new.dtype, new.shape):
        raise ValueError(
            f"tensor {name}: one rank has {known.dtype} {known.shape}, another {new.dtype} {new.shape}"
        )
    boxes = {part.box for part in known.slices}
    fresh = tuple(part for part in new.slices if part.box not in boxes)
    return TensorRecord(known.dtype, known.shape, known.slices + fresh)


def load_manifest(directory: Path) -> Manifest:
    """Read the manifest of checkpoint `directory`, its digest first.

    Raises:
        FileNotFoundError: `directory`, manifest.json or manifest.sha256 is missing.
        ValueError: the two disagree, or the manifest is malformed; the message names the file.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a checkpoint directory")
    data, line = (_read_small(directory / name) for name in (MANIFEST_FILE, DIGEST_FILE))
    match = DIGEST_LINE.fullmatch(line.decode("latin-1"))
    if not match:
        raise ValueError(f"{directory / DIGEST_FILE} is damaged: it does not hold a SHA-256")
    if hashlib.sha256(data).hexdigest() != match[1]:
        raise ValueError(f"{directory / MANIFEST_FILE} and {DIGEST_FILE} disagree: one of them is damaged")
    try:
        return _parse(json.loads(data), digest=match[1])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory / MANIFEST_FILE} is malformed and was refused: {error!r}") from error


def _read_small(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint was never finished, or is being removed")
    size = path.stat().st_size
    if size > MAX_MANIFEST:
        raise ValueError(f"{path} has {size} bytes; {MAX_MANIFEST} is the most a manifest may have")
    return path.read_bytes()


def _parse(value: Any, *, digest: str) -> Manifest:
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {value['format']!r} version {value['version']!r}, not {FORMAT} {VERSION}")
    part = RankPart.from_json(value)
    step, world_size = _integers([value["step"], value["world_size"]])
    for name in (STATE_FILE, *(used.file for record in part.tensors.values() for used in record.slices)):
        if name not in part.files:
            raise ValueError(f"{name} is used and not listed among the files")
    for name, record in part.tensors.items():
        check_cover(name, record.shape, [used.box for used in record.slices])
    return Manifest(part.files, part.tensors, step, world_size, digest)


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    result = tuple(values)
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in result):
        raise ValueError(f"{result} are not all whole numbers of 0 or more")
    return result


def _file_record(value: Any) -> FileRecord:
    (size,), sha256 = _integers([value["bytes"]]), value["sha256"]
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is not a SHA-256")
    return FileRecord(size, sha256)
