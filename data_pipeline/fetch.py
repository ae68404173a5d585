"""Stage "fetch": a streamed data set becomes parts on this disk, small enough for one clean unit each.

    shard (a file of the repository) -> records -> part 0, part 1, ... -> clean units, in that order

A task reads one shard from its beginning to its end. It closes a part with the record that brings its text to
`unit_bytes`, and commits it like any other unit: what is in a part depends on the stream alone. A task that
is started again skips the records of the parts that are there. The stream cannot be entered in its middle, so
that reads the shard's first bytes once more, but it writes nothing and converts nothing for them.

A committed part holds

    records.jsonl.zst     {"row": n, "text": ...}, or {"row": n, "reason": ...} for what can be no document
    unit.json             "first": row; "records"; "bytes" of text; "last": whether the shard ends with it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.commit import commit_unit, read_unit, unit_folder
from data_pipeline.config import SourceConfig
from data_pipeline.progress import Bar
from data_pipeline.readers import Document, Item, Quarantined, checked, load_streaming
from data_pipeline.run import Run
from data_pipeline.sources import Unit
from trellis_dist.files import digest, sha256_file

__all__ = ["Fetched", "Stream", "Want", "fetch", "fetch_shard", "plan_stream"]

RECORDS = "records.jsonl.zst"
# Rows converted together.
BATCH = 256
# Raise when the code below, or `readers.checked`, changes what a part contains.
VERSION = 1


@dataclass(frozen=True)
class Stream:
    """A streamed data set, and how it is cut.

    Attributes:
        source: its name, and how records are read.
        content: hash of its name, subset, revision, split and files.
        shards: files, or what else it can be read in parallel by.
        unit_bytes: text of a part.
    """

    source: SourceConfig
    content: str
    shards: int
    unit_bytes: int

    def key(self, shard: int, part: int) -> str:
        """Content address of a part."""
        read = [self.unit_bytes, self.source.text_column, self.source.max_document_bytes]
        return digest([VERSION, self.content, shard, self.shards, part, read])

    def item(self, shard: int, part: int, entry: Mapping[str, Any], work: Path) -> Item:
        """A committed part as the input of a clean unit."""
        key, stop = self.key(shard, part), entry["first"] + entry["records"]
        path = str(unit_folder(work, "fetch", key) / RECORDS)
        return Item(
            "part", self.name(shard), "huggingface", path, key, entry["first"], stop, max(1, entry["bytes"])
        )

    def name(self, shard: int) -> str:
        """A shard, for messages."""
        return f"{self.source.name}[{shard}]"


def plan_stream(source: SourceConfig, unit_bytes: int) -> Stream:
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
    return Stream(source, content, stream.num_shards, unit_bytes)


def fetch_shard(
    stream: Stream, shard: int, part: int, row: int, limits: Mapping[str, float], work: str
) -> list[dict[str, Any]]:
    """Commit the parts of a shard from `part` on, which begins at `row`; what is there is not made again.

    Args:
        limits: stop after the part that brings "bytes" of text, or "documents", to this many; empty: never.

    Returns:
        unit.json of each part, in order.

    Raises:
        OSError: the network, the file or its content failed on the way; the message names the shard. What
            cannot be read as a table of records (a damaged .parquet, a truncated .gz, broken JSON) is one of
            these, since a stream does not go on behind it. Committed parts stay.
    """
    records = _Records(stream, shard, row)
    entries: list[dict[str, Any]] = []
    while not entries or not (entries[-1]["last"] or _reached(limits, _sums(entries))):
        key = stream.key(shard, part + len(entries))
        entry = read_unit(unit_folder(work, "fetch", key))
        if entry is None:
            entry = commit_unit(work, "fetch", key, partial(_write_part, records, stream.unit_bytes))
        else:
            records.skip(entry["records"])
        entries.append(entry)
    return entries


def _sums(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "documents": sum(entry["records"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }


def _reached(limits: Mapping[str, float], sums: Mapping[str, int]) -> bool:
    return any(sums[name] >= limit for name, limit in limits.items())


def _write_part(records: _Records, unit_bytes: int, folder: Path) -> dict[str, Any]:
    import zstandard

    first, size = records.row, 0
    # With a checksum: a part that was damaged after it was verified is seen while it is read.
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    with open(folder / RECORDS, "xb") as file, compressor.stream_writer(file) as out:
        while size < unit_bytes and not records.ended:
            found = records.take()
            record: dict[str, Any] = {"row": found.offset}
            if isinstance(found, Document):
                record["text"] = found.text
                size += len(found.text.encode())
            else:
                record["reason"] = found.reason
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return {"first": first, "records": records.row - first, "bytes": size, "last": records.ended}


class _Records:
    """The records of a shard from a row on; the stream is opened when the first one is wanted.

    Attributes:
        row: of the next record.
    """

    def __init__(self, stream: Stream, shard: int, row: int) -> None:
        self._stream, self._shard, self.row = stream, shard, row
        self._open = False
        self._found: Iterator[Document | Quarantined] = iter(())
        self._next: Document | Quarantined | None = None

    @property
    def ended(self) -> bool:
        """Whether no record is left; looks one ahead. Raises OSError as `fetch_shard`."""
        if not self._open:
            self._open, self._found = True, _read(self._stream, self._shard, self.row)
            self._next = next(self._found, None)
        return self._next is None

    def take(self) -> Document | Quarantined:
        """The next record, which there is."""
        found = self._next
        assert found is not None, "asked for a record behind the last"
        self.row += 1
        self._next = next(self._found, None)
        return found

    def skip(self, count: int) -> None:
        """Go on `count` records later."""
        if self._open:
            for _ in range(count):
                self.take()
        else:
            self.row += count


def _read(stream: Stream, shard: int, row: int) -> Iterator[Document | Quarantined]:
    item = Item("part", stream.name(shard), "huggingface", "", "", 0, 0, 0)
    for value in _values(stream, shard, row):
        if isinstance(value, UnicodeDecodeError):
            yield Quarantined(item.name, row, f"not UTF-8 ({value.reason})")
        else:
            yield checked(item, value, row, stream.source)
        row += 1


def _values(stream: Stream, shard: int, row: int) -> Iterator[Any]:
    """What stands in the text column from `row` on, or the error that its bytes are not UTF-8.

    Raises:
        OSError: anything that `datasets` raises; its file systems and readers have a hundred exceptions.
    """
    column = stream.source.text_column
    try:
        opened = load_streaming(stream.source)
        if opened.num_shards != stream.shards:
            raise OSError(f"there are {opened.num_shards} shards now, {stream.shards} when it was planned")
        opened = opened.shard(num_shards=stream.shards, index=shard).skip(row)
        if opened.features is None:  # tables that may differ in their columns cannot be joined to batches
            yield from (record.get(column) for record in opened)
            return
        for table in opened.with_format("arrow").iter(BATCH):
            yield from map(_value, table[column])
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise OSError(f"shard {shard} of {stream.source.name}: {reason}: run prepare again") from error


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


@dataclass
class Fetched:
    """What of a stream is on this disk, as far as it was asked for.

    Attributes:
        stream: which.
        entries: unit.json of the leading parts, by shard.
    """

    stream: Stream
    entries: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def ends(self, shard: int) -> bool:
        """Whether all parts of a shard are here."""
        known = self.entries.get(shard)
        return bool(known) and known[-1]["last"]  # type: ignore[index]

    @property
    def missing(self) -> list[int]:
        """Shards that are not all here."""
        return [shard for shard in range(self.stream.shards) if not self.ends(shard)]

    def _leading(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for shard in range(self.stream.shards):
            yield from ((shard, part, entry) for part, entry in enumerate(self.entries.get(shard, [])))
            if not self.ends(shard):
                return

    def units(self, work: Path) -> list[Unit]:
        """The parts that follow one another from the first of shard 0; more are only ever appended."""
        return [Unit((self.stream.item(shard, part, entry, work),)) for shard, part, entry in self._leading()]

    def sums(self) -> dict[str, int]:
        """ "documents" and "bytes" of the parts in `units`."""
        return _sums([entry for _, _, entry in self._leading()])


@dataclass
class Want:
    """More of one stream, in `work`: until a limit is reached, or all of it where there is none."""

    fetched: Fetched
    limits: Mapping[str, float]
    work: Path
    got: dict[str, int] = field(default_factory=lambda: _sums([]))

    @property
    def full(self) -> bool:
        """Whether this is enough."""
        return _reached(self.limits, self.got)

    def put(self, shard: int, entry: dict[str, Any]) -> None:
        """The next part of a shard is here."""
        self.fetched.entries.setdefault(shard, []).append(entry)
        for name, value in _sums([entry]).items():
            self.got[name] += value

    def look(self, shard: int) -> bool:
        """Take the parts that are committed; returns whether the shard ends, or they are enough."""
        stream, known = self.fetched.stream, self.fetched.entries.setdefault(shard, [])
        while not (self.full or self.fetched.ends(shard)):
            entry = read_unit(unit_folder(self.work, "fetch", stream.key(shard, len(known))))
            if entry is None:
                return False
            self.put(shard, entry)
        return True

    def call(self, shard: int) -> tuple[Any, ...]:
        """Arguments of `fetch_shard` for what is missing of a shard."""
        known = self.fetched.entries[shard]
        row = known[-1]["first"] + known[-1]["records"] if known else 0
        left = {name: limit - self.got[name] for name, limit in self.limits.items()}
        return self.fetched.stream, shard, len(known), row, left, str(self.work)


def fetch(wants: Sequence[Want], run: Run) -> None:
    """Fetch what is wanted: with limits shard by shard, each to its end; without, all shards in parallel.

    Raises:
        OSError: as `fetch_shard`; what is committed stays.
    """
    started = False
    with Bar("fetch", sum(len(want.fetched.missing) for want in wants), shown=run.progress) as bar:
        while todo := [(want, shard) for want in wants for shard in _next(want, bar, run.threads)]:
            calls = [want.call(shard) for want, shard in todo]
            if not started:
                run.workers.start()
                bar.restart()
                started = True
            for position, entries in run.workers.run(fetch_shard, calls):
                want, shard = todo[position]
                for entry in entries:
                    want.put(shard, entry)
                bar.count(_sums(entries))


def _next(want: Want, bar: Bar, threads: int) -> list[int]:
    """The shards to go on with, once what is committed of them is taken."""
    if not want.limits:
        missing = want.fetched.missing
        with ThreadPoolExecutor(max_workers=threads) as pool:
            found = list(pool.map(want.look, missing))
        for _ in filter(None, found):
            bar.count({}, reused=True)
        return [shard for shard, here in zip(missing, found) if not here]
    for shard in want.fetched.missing:
        if want.full:
            break
        if not want.look(shard):
            return [shard]
        bar.count({}, reused=True)
    return []
