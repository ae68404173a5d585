"""Row indexes: the table of pieces of one shard in a file, for every packing but plain "concat".

DIRECTORY/index/SHARD-PACKING-T-C.rows (little endian):
    "TRLROWS\\0" | version 1 (u32) | packing (u32) | T | C | rows R | pieces P | positions
    | cut documents (u64 each) | sha256 of the shard's .idx (32 bytes) | first int64 [R + 1]
    | starts int64 [P] | positions int32 [P] | sha256 of everything before (32 bytes)
It follows from the .idx alone, so it is no part of the data set's identity: one that is missing, damaged or
of another .idx is made again, by any process, with the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import ShardInfo
from data_pipeline.pack import Packing, PieceTable, pack
from data_pipeline.shard import Shard
from trellis_dist.files import atomic_write, sha256_file

__all__ = [
    "build_row_index",
    "check_alignment",
    "needs_row_index",
    "open_row_index",
    "row_index_path",
    "verify_row_index",
]

FOLDER = "index"
MAGIC, VERSION = b"TRLROWS\x00", 1
HEADER = struct.Struct("<8sII6Q32s")
SEAL = 32
PACKINGS: tuple[Packing, ...] = ("concat", "best_fit", "per_document")
REMAKE = "delete it, and it is made again when the data set is opened"


@dataclass(frozen=True)
class _Header:
    """What a row index says of itself before its arrays."""

    packing: Packing
    sequence_length: int
    align: int
    rows: int
    pieces: int
    positions: int
    cut: int
    sha256_idx: str

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER.size + 8 * (self.rows + 1) + 12 * self.pieces + SEAL

    def counts(self) -> dict[str, int]:
        """What `build_row_index` reports."""
        return {"rows": self.rows, "positions": self.positions, "cut_documents": self.cut}


def needs_row_index(packing: Packing, align: int) -> bool:
    """False for "concat" without alignment, whose rows are arithmetic."""
    return packing != "concat" or align > 1


def row_index_path(
    directory: Path | str, shard_name: str, *, packing: Packing, sequence_length: int, align: int
) -> Path:
    """Where the row index of a shard lies."""
    return Path(directory) / FOLDER / f"{shard_name}-{packing}-{sequence_length}-{align}.rows"


def build_row_index(
    directory: Path | str, shard: ShardInfo, *, packing: Packing, sequence_length: int, align: int
) -> dict[str, int]:
    """Make the row index of a shard; one that is there, whole and of this shard, is left alone.

    Args:
        directory: the data set, with the shard's .bin and .idx.
        shard: its entry in the manifest.
        packing, sequence_length, align: see `data_pipeline.pack.pack`.

    Returns:
        rows, positions (tokens that are predicted) and cut_documents of the shard.

    Raises:
        ValueError: the shard is missing or damaged, T is no multiple of `align`, or nothing is to be indexed.
        OSError: the index cannot be written.
    """
    check_alignment(sequence_length, align)
    if not needs_row_index(packing, align):
        raise ValueError('packing = "concat" without alignment has no row index')
    path = row_index_path(
        directory, shard.name, packing=packing, sequence_length=sequence_length, align=align
    )
    if path.is_file() and verify_row_index(path) is None:
        header = _read_header(path)
        if header.sha256_idx == shard.sha256_idx:
            return header.counts()
    _check_index_file(Path(directory) / f"{shard.name}.idx", shard)
    starts = Shard(Path(directory) / shard.name).starts
    table = pack(starts, packing=packing, sequence_length=sequence_length, align=align)
    header = _Header(
        packing=packing,
        sequence_length=sequence_length,
        align=align,
        rows=table.num_rows,
        pieces=len(table.starts),
        positions=int(table.positions.sum()),
        cut=table.cut,
        sha256_idx=shard.sha256_idx,
    )
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, _encoded(header, table))
    return header.counts()


def check_alignment(sequence_length: int, align: int) -> None:
    """Raise ValueError unless rows of T positions are whole chunks of `align`."""
    if align < 1 or sequence_length % align:
        below = sequence_length // max(1, align) * align
        near = f"{below} or {below + align}" if below else f"{align}"
        raise ValueError(
            f"data.sequence_length = {sequence_length} is no multiple of the chunk size {align} at which "
            f"documents start (data.chunk_aligned): use {near}"
        )


def _check_index_file(path: Path, shard: ShardInfo) -> None:
    """A table made of a damaged .idx would outlive its repair."""
    if path.is_file() and sha256_file(path) != shard.sha256_idx:
        raise ValueError(
            f"{path} is damaged (its sha256 is not the manifest's): delete it and run `trellis prepare` again"
        )


def _encoded(header: _Header, table: PieceTable) -> list[bytes]:
    pieces = [
        HEADER.pack(
            MAGIC,
            VERSION,
            PACKINGS.index(header.packing),
            header.sequence_length,
            header.align,
            header.rows,
            header.pieces,
            header.positions,
            header.cut,
            bytes.fromhex(header.sha256_idx),
        ),
        table.first.astype("<i8").tobytes(),
        table.starts.astype("<i8").tobytes(),
        table.positions.astype("<i4").tobytes(),
    ]
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return [*pieces, state.digest()]


def _read_header(path: Path) -> _Header:
    """ValueError: it is none, or says what cannot be."""
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no row index: {REMAKE}")
    _, version, packing, width, align, rows, pieces, positions, cut, source = HEADER.unpack(raw)
    if version != VERSION or packing >= len(PACKINGS):
        raise ValueError(f"{path} is a row index of version {version}, this is {VERSION}: {REMAKE}")
    return _Header(PACKINGS[packing], width, align, rows, pieces, positions, cut, source.hex())


def verify_row_index(path: Path) -> str | None:
    """One line that names the file and the remedy when it is missing or damaged, else None."""
    try:
        header, size = _read_header(path), path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing: it is made when the data set is opened"
    except (OSError, ValueError) as error:
        return str(error)
    parts = header.packing, header.sequence_length, header.align
    if not path.name.endswith("-{}-{}-{}.rows".format(*parts)):
        return f"{path} is a row index of packing {parts}: {REMAKE}"
    if size != header.size:
        return f"{path} is damaged ({size} bytes, its header says {header.size}): {REMAKE}"
    with open(path, "rb") as file:
        file.seek(size - SEAL)
        seal = file.read(SEAL).hex()
    if seal != sha256_file(path, stop=size - SEAL):
        return f"{path} is damaged (its content does not match its sha256): {REMAKE}"
    return None


def open_row_index(
    directory: Path | str, shard: ShardInfo, *, packing: Packing, sequence_length: int, align: int
) -> PieceTable:
    """The table of a shard's rows as views of its mapped file, which is made first where need be.

    Raises:
        ValueError: what `build_row_index` raises, or the index cannot be written; in one line.
    """
    path = row_index_path(
        directory, shard.name, packing=packing, sequence_length=sequence_length, align=align
    )
    try:
        build_row_index(directory, shard, packing=packing, sequence_length=sequence_length, align=align)
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise ValueError(
            f"row index {path} cannot be made here ({error}): run `trellis prepare` with this packing and "
            "sequence length where the data set is writable"
        ) from error
    header = _read_header(path)
    middle = HEADER.size + 8 * (header.rows + 1)
    last = middle + 8 * header.pieces
    return PieceTable(
        first=raw[HEADER.size : middle].view("<i8"),
        starts=raw[middle:last].view("<i8"),
        positions=raw[last : last + 4 * header.pieces].view("<i4"),
        cut=header.cut,
    )
