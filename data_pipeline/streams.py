"""Streams: inputs that are read from their beginning to their end and cannot be entered anywhere else.

    RemoteShard    one of the files, or whatever else it is read in parallel by, of a Hugging Face data set
    Archive        a .jsonl.gz or .jsonl.zst file of the corpus, larger than a unit

Both are cut into parts by fetch.py, which asks them for the same things.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.content import content_of
from data_pipeline.readers import Document, Item, Quarantined, checked, load_streaming, read_lines
from data_pipeline.sources import Unit, plan_units
from trellis_dist.files import digest, sha256_file

__all__ = ["Archive", "RemoteShard", "Shard", "plan_source", "plan_stream"]

# Rows converted together.
BATCH = 256


@dataclass(frozen=True)
class RemoteShard:
    """A shard of a streamed data set.

    Attributes:
        source: the data set's name, and how records are read.
        content: hash of its name, subset, revision, split and files.
        index, count: which shard this is, and of how many.
        unit_bytes: text of a part.
    """

    source: SourceConfig
    content: str
    index: int
    count: int
    unit_bytes: int

    label = "huggingface"

    @property
    def name(self) -> str:
        """For messages, and the file that records are said to come from."""
        return f"{self.source.name}[{self.index}]"

    def address(self, part: int) -> list[Any]:
        """What decides a part, as JSON."""
        return [self.content, self.index, self.count, part, _read_by(self.source, self.unit_bytes)]

    def sealed(self) -> RemoteShard:
        """Itself: files of the Hub carry their revision, local ones were hashed."""
        return self

    def check(self) -> None:
        """Nothing: what was read of a revision is what it holds."""

    def records(self, row: int) -> Iterator[Document | Quarantined]:
        """The records from `row` on.

        Raises:
            OSError: the network, the file or its content failed on the way; the message names the shard.
        """
        item = Item("part", self.name, self.label, "", "", 0, 0, 0)
        for value in _values(self, row):
            if isinstance(value, UnicodeDecodeError):
                yield Quarantined(item.name, row, f"not UTF-8 ({value.reason})")
            else:
                yield checked(item, value, row, self.source)
            row += 1


@dataclass(frozen=True)
class Archive:
    """A compressed file of JSON lines.

    Attributes:
        source: how records are read.
        item: the whole file.
        unit_bytes: text of a part.
        stamp: the file's size and time of change when it was hashed.
    """

    source: SourceConfig
    item: Item
    unit_bytes: int
    stamp: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For messages, and the file that records are said to come from."""
        return self.item.name

    @property
    def label(self) -> str:
        """Of the documents."""
        return self.item.source

    def address(self, part: int) -> list[Any]:
        """What decides a part, as JSON; the file's name does not."""
        assert self.item.content, f"{self.name} is not sealed"
        suffix = Path(self.item.path).suffix
        return [self.item.content, suffix, part, _read_by(self.source, self.unit_bytes)]

    def sealed(self) -> Archive:
        """The archive with the hash of what it holds now, which is found once.

        Raises:
            OSError: it is gone, or it changed since it was planned.
        """
        if self.stamp is not None:
            return self
        item, stamp = self.item, _stamp(self.item.path)
        content = content_of(item.reader, item.path, item.start, item.stop)
        found = replace(self, item=replace(item, content=content), stamp=stamp)
        if stamp[0] != item.stop:
            raise OSError(f"{self.name} changed while the job ran: run prepare again")
        found.check()
        return found

    def check(self) -> None:
        """Raise OSError where the file is no longer the one that was hashed, whatever was read of it."""
        if _stamp(self.item.path) != self.stamp:
            raise OSError(f"{self.name} changed while the job ran: run prepare again")

    def records(self, row: int) -> Iterator[Document | Quarantined]:
        """The records from `row` on, by byte offsets in the expanded file. Raises OSError as `read_item`."""
        return read_lines(self.item, self.source, row)


Shard = RemoteShard | Archive


def _read_by(source: SourceConfig, unit_bytes: int) -> list[Any]:
    return [unit_bytes, source.text_column, source.max_document_bytes]


def _stamp(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def plan_source(source: SourceConfig, unit_bytes: int) -> list[Unit | Shard]:
    """The corpus in its order: units, and what must be fetched: shards, archives larger than a unit.

    Raises:
        ValueError: as `plan_units` and `plan_stream`.
    """
    if source.kind == "huggingface":
        return [*plan_stream(source, unit_bytes)]

    def piece(unit: Unit) -> Unit | Shard:
        item = unit.items[0]
        large = item.size > unit_bytes and item.reader == "jsonl" and not item.path.endswith(".jsonl")
        return Archive(source, item, unit_bytes) if large else unit

    return [piece(unit) for unit in plan_units(source, unit_bytes)]


def plan_stream(source: SourceConfig, unit_bytes: int) -> list[RemoteShard]:
    """Open the data set, and read nothing of it but what `datasets` needs to know its columns.

    Raises:
        ValueError: no such data set, subset, split, revision or text column, or it has no files.
    """
    stream = load_streaming(source)
    if not stream.num_shards:
        raise ValueError(
            "data.source: the huggingface corpus is empty: choose a data.source.name, subset and split that "
            "holds rows"
        )
    # Files of the Hub carry their revision in their address; local ones are hashed.
    given = getattr(getattr(stream, "_ex_iterable", None), "kwargs", {})
    files = [file for file in given.get("base_files") or given.get("files") or [] if isinstance(file, str)]
    hashes = [sha256_file(Path(file)) if Path(file).is_file() else file for file in files]
    content = digest([source.name, source.subset, source.revision, source.split, hashes])
    count = stream.num_shards
    return [RemoteShard(source, content, index, count, unit_bytes) for index in range(count)]


def _values(shard: RemoteShard, row: int) -> Iterator[Any]:
    """What stands in the text column from `row` on, or the error that its bytes are not UTF-8.

    Raises:
        OSError: anything that `datasets` raises; its file systems and readers have a hundred exceptions.
    """
    column = shard.source.text_column
    try:
        opened = load_streaming(shard.source)
        if opened.num_shards != shard.count:
            raise OSError(f"there are {opened.num_shards} shards now, {shard.count} when it was planned")
        opened = opened.shard(num_shards=shard.count, index=shard.index).skip(row)
        if opened.features is None:  # tables that may differ in their columns cannot be joined to batches
            yield from (record.get(column) for record in opened)
            return
        for table in opened.with_format("arrow").iter(BATCH):
            yield from map(_value, table[column])
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise OSError(f"shard {shard.index} of {shard.source.name}: {reason}: run prepare again") from error


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
