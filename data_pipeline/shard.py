"""Token shards in Megatron's indexed format, and a reader of them that needs numpy only.

A shard is two files (megatron/core/datasets/indexed_dataset.py). NAME.bin holds the tokens end to end;
NAME.idx is
    "MMIDIDX\\0\\0" | version 1 (u64) | dtype code (u8) | sequences n (u64) | documents n + 1 (u64)
    | lengths int32[n] | byte offsets int64[n] | first sequence of each document int64[n + 1]
(little endian). One sequence is one document here. Megatron's own builder neither syncs nor renames; this one
does, and the same documents give the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trellis_dist.files import atomic_write

__all__ = ["Shard", "ShardFiles", "token_dtype", "write_shard"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}


@dataclass(frozen=True)
class ShardFiles:
    """Hashes and sizes of a written shard."""

    sha256_bin: str
    sha256_idx: str
    documents: int
    tokens: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron takes for a vocabulary: uint16 where the ids fit, else int32."""
    return CODES[8] if vocab_size < 65500 else CODES[4]


def write_shard(stem: Path, documents: Iterable[np.ndarray], *, dtype: np.dtype) -> ShardFiles:
    """Write ``stem.bin`` and ``stem.idx``, each durable and under its name only when complete.

    Args:
        stem: folder and shard name; files already there are replaced.
        documents: token ids of each document, 1-D; consumed once, one document in memory at a time.
        dtype: of the stored tokens (`token_dtype`).

    Raises:
        OSError: the disk is full, ...; a shard that was there before is still there.
    """
    lengths: list[int] = []
    state = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for document in documents:
            piece = np.ascontiguousarray(document, dtype=dtype).tobytes()
            lengths.append(len(document))
            state.update(piece)
            yield piece

    atomic_write(stem.with_name(stem.name + ".bin"), pieces())
    index = _index_bytes(np.array(lengths, dtype="<i4"), dtype)
    atomic_write(stem.with_name(stem.name + ".idx"), index)
    return ShardFiles(state.hexdigest(), hashlib.sha256(index).hexdigest(), len(lengths), sum(lengths))


def _index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    count = len(lengths)
    code = next(code for code, known in CODES.items() if known == dtype)
    offsets = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:])
    offsets *= dtype.itemsize
    header = HEADER.pack(MAGIC, 1, code, count, count + 1)
    return b"".join(
        [header, lengths.tobytes(), offsets.tobytes(), np.arange(count + 1, dtype="<i8").tobytes()]
    )


class Shard:
    """A shard opened through memory maps; nothing of it is read before it is asked for.

    Attributes:
        tokens: all tokens, 1-D, read-only, a view of the mapped .bin.
        documents: how many there are.
    """

    def __init__(self, stem: Path) -> None:
        """Open ``stem.bin`` and ``stem.idx``; ValueError names the file that is missing or malformed."""
        index, data = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
        for path in (index, data):
            if not path.is_file():
                raise ValueError(f"shard file {path} is missing: run `trellis prepare` to make it again")
        dtype, lengths, self._offsets = _map_index(index)
        self.documents, self._itemsize = len(lengths), dtype.itemsize
        expected = int(self._offsets[-1]) + int(lengths[-1]) * dtype.itemsize if len(lengths) else 0
        if data.stat().st_size != expected:
            raise ValueError(f"shard file {data} has {data.stat().st_size} bytes, its index says {expected}")
        mapped = np.memmap(data, dtype=dtype, mode="r") if expected else np.zeros(0, dtype)
        self.tokens = np.asarray(mapped)  # slices of a plain array cost half as much

    @property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1], where each document begins, and the number of tokens; made in memory."""
        return np.append(self._offsets // self._itemsize, len(self.tokens))

    def document(self, index: int) -> np.ndarray:
        """Stored tokens of a document, a view of the file."""
        last = index + 1 == self.documents
        stop = len(self.tokens) if last else int(self._offsets[index + 1]) // self._itemsize
        return self.tokens[int(self._offsets[index]) // self._itemsize : stop]

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """int64 [n], the positions in [start, stop) where documents begin; reads O(log documents) + n."""
        size = self._itemsize
        low = bisect_left(self._offsets, start * size)
        return self._offsets[low : bisect_left(self._offsets, stop * size, lo=low)] // size


def _map_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Token dtype, document lengths int32 [n] and byte offsets int64 [n], both views of the mapped file."""
    if path.stat().st_size < HEADER.size:
        raise ValueError(f"shard file {path} is no Megatron index")
    raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    magic, version, code, count, documents = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise ValueError(f"shard file {path} is no Megatron index")
    size = HEADER.size + 12 * count + 8 * documents
    if version != 1 or code not in CODES or documents != count + 1 or len(raw) != size:
        raise ValueError(f"shard file {path} is damaged (version {version}, dtype {code}, {count} sequences)")
    middle = HEADER.size + 4 * count
    lengths, offsets = raw[HEADER.size : middle].view("<i4"), raw[middle : middle + 8 * count].view("<i8")
    return CODES[code], lengths, offsets
