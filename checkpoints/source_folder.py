"""A folder of weights as others write them (Hugging Face layout), read as what it is: data from outside.

config.json    model.safetensors, else model.safetensors.index.json and the files that it names

Nothing is unpickled, headers are checked and capped before the library opens a file, names in the index are
those of files in the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.logical import check_name
from checkpoints.tensor_file import read_header
from trellis_dist.files import read_json
from trellis_dist.models.config import ModelConfig

__all__ = ["SourceFolder", "checked_section", "model_type"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The largest published index (hundreds of thousands of names) is some tens of MB; a config.json a few KB.
MAX_INDEX, MAX_CONFIG = 64 << 20, 1 << 20


class SourceFolder:
    """Configuration and tensors by name; a tensor is read when it is asked for.

    Attributes:
        config: the table in config.json.
        files: tensor -> the file that holds it.
        headers: tensor -> safetensors' name of its type, and its shape, as its file's header has them.

    Raises:
        FileNotFoundError: no folder, no config.json or a file of weights is missing.
        ValueError: pickled weights, a malformed or oversized file, a name that leads out of the folder.
    """

    def __init__(self, directory: Path) -> None:
        """Reads config.json, the index if there is one, and every header."""
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is no folder: give the one that holds config.json and weights"
            )
        self.config = _read_table(self.directory / CONFIG, MAX_CONFIG)
        self.files: dict[str, Path] = {}
        self.headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, names in self._weight_files().items():
            held = _held(path, names)
            self.files.update(dict.fromkeys(held, path))
            self.headers.update(held)
        self._open: dict[Path, Any] = {}

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of tensor `name`. Raises ValueError: there is none."""
        if name not in self.headers:
            raise ValueError(
                f"{self.directory} has no tensor {name!r}: its weights do not fit its config.json"
            )
        return self.headers[name]

    def read(self, name: str) -> Tensor:
        """Tensor `name` on the CPU. Raises ValueError: there is none, or its file cannot be read."""
        self.header(name)
        path = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return tensor

    def _weight_files(self) -> dict[Path, set[str] | None]:
        """File -> the names it should hold; None: whatever it holds."""
        # In this order, as in transformers: export.json vouches for the one file; an index may be left over.
        single = self.directory / WEIGHTS
        if single.is_file():
            return {single: None}
        index = self.directory / INDEX
        if index.is_file():
            return _indexed(index)
        pickled = sorted(path.name for pattern in PICKLED for path in self.directory.glob(pattern))
        if pickled:
            raise ValueError(
                f"{self.directory / pickled[0]} is a pickle, which can run code and is never opened: save "
                "the model as safetensors where you trust the file (transformers: model.save_pretrained)"
            )
        raise FileNotFoundError(f"{self.directory} has neither {WEIGHTS} nor {INDEX}: it holds no weights")


def checked_section(section: Mapping[str, Any], *, source: str) -> ModelConfig:
    """`section` as a model's configuration. Raises ValueError: one line, with key, value and `source`."""
    try:
        return TypeAdapter(ModelConfig).validate_python(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("model", *first["loc"])))
        message = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise ValueError(f"{source}: {key} = {shown}: {message}") from error


def model_type(directory: Path) -> str | None:
    """What the config.json of `directory` says it is; None: there is none, or it cannot be read."""
    try:
        kind = _read_table(directory / CONFIG, MAX_CONFIG).get("model_type")
    except (ValueError, OSError):
        return None
    return kind if isinstance(kind, str) else None


def _read_table(path: Path, limit: int) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is no folder of a model")
    if path.stat().st_size > limit:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {limit} is the most that is read")
    table = read_json(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds a {type(table).__name__}, not a table of settings")
    return table


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    placed = _read_table(index, MAX_INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise ValueError(f"{index} has no weight_map: it is damaged")
    found: dict[Path, set[str] | None] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise ValueError(
                f"{index} places {name!r} in {file!r}, which is no .safetensors file of the folder"
            )
        names = found.setdefault(index.parent / file, set())
        assert names is not None, "made above"
        names.add(name)
    return found


def _held(path: Path, wanted: set[str] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of `path`, whose names must be `wanted`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and {INDEX} names it")
    held = read_header(path)
    for name in held:
        try:
            check_name(name)  # they are printed, and become names of ours
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if wanted is not None and (different := sorted(held.keys() ^ wanted)):
        raise ValueError(f"{path} and {INDEX} disagree about {different[0]!r}: one of them is damaged")
    return held
