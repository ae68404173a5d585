"""safetensors files, streamed: hashed while written, and checked before the library is let near them.

Format: 8 bytes header length (little endian), JSON header {key: {dtype, shape, data_offsets}}, raw data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis_dist.files import FileSystem

__all__ = ["DTYPES", "MAX_HEADER", "Entry", "FileRecord", "dtype_name", "read_header", "write_tensors"]

# The library accepts 100 MB; a rank's largest real header (tens of thousands of slices) is a few MB.
MAX_HEADER = 32 << 20
PIECE = 1 << 20  # hashed and written while it is in the cache

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `load` is called once, when its turn comes: a large file needs little memory."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of `dtype`. Raises ValueError when checkpoints do not hold it."""
    if dtype not in NAMES:
        raise ValueError(f"dtype {dtype} cannot be saved: convert to one of {', '.join(DTYPES)}")
    return NAMES[dtype]


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    *,
    file_system: FileSystem,
    proceed: Callable[[], None] | None = None,
) -> FileRecord:
    """Write `entries` to the new file `path`, fsync it, return its size and digest.

    `proceed` is called before each piece of 1 MiB or less; what it raises ends the write. Raises OSError.
    """
    # Wide types first, as the library does: every tensor then starts at a multiple of its element size.
    ordered = sorted(entries, key=lambda entry: (-DTYPES[entry.dtype].itemsize, entry.key))
    header = _header(ordered)
    state = hashlib.sha256()

    def pieces() -> Iterator[bytes | memoryview]:
        for piece in _chain(header, ordered):
            if proceed is not None:
                proceed()
            state.update(piece)
            yield piece

    file_system.write_large(path, pieces())
    file_system.fsync_file(path)
    return FileRecord(len(header) + sum(entry.size for entry in ordered), state.hexdigest())


def _header(entries: Sequence[Entry]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        fields[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"{len(entries)} tensors need a header of {len(text)} bytes; {MAX_HEADER} is the limit"
        )
    return struct.pack("<Q", len(text)) + text


def _chain(header: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield header
    for entry in entries:
        values = entry.load().detach().to("cpu").contiguous()
        loaded = (dtype_name(values.dtype), tuple(values.shape))
        assert loaded == (entry.dtype, entry.shape), f"{entry.key}: loaded {loaded}, declared {entry}"
        data = values.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key -> (dtype name, shape) of a safetensors file, every field checked before it is used.

    Raises:
        ValueError: not such a file, a header beyond `MAX_HEADER`, data that does not fill the file exactly.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            limit = f"at most {MAX_HEADER} bytes are accepted"
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in {size} ({limit})")
        text = file.read(length)
    try:
        fields = json.loads(text)
        return _check_fields(fields, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a malformed safetensors header ({error})") from error


def _check_fields(fields: Mapping[str, Any], data_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    spans, result = [], {}
    for key, field in fields.items():
        if key == "__metadata__":
            continue
        dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        if dtype not in DTYPES or any(type(value) is not int or value < 0 for value in (*shape, start, stop)):
            raise ValueError(f"{key!r}: dtype {dtype!r}, shape {shape}, bytes {start} to {stop}")
        if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{key!r}: {stop - start} bytes for {dtype} {shape}")
        spans.append((start, stop))
        result[key] = (dtype, shape)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"a gap or an overlap at byte {end}")
        end = stop
    if end != data_size:
        raise ValueError(f"{data_size} bytes of data where {end} are described")
    return result
