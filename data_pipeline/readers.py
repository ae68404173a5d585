"""Readers: one input (a file, a range of one, a topic, a part of a stream) to documents.

They never raise on bad text: a record that cannot be a document is yielded as `Quarantined` with file, offset
and reason, and reading goes on.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from data_pipeline.config import SourceConfig

__all__ = [
    "Document",
    "Item",
    "Quarantined",
    "book_span",
    "checked",
    "load_streaming",
    "open_parquet",
    "read_item",
    "read_lines",
    "skip_line",
]

# A compressed file that expands beyond this ratio (and beyond a size where ratios mean something) is a bomb.
MAX_EXPANSION, EXPANSION_FLOOR = 200, 64 * 2**20
PARQUET_ROWS = 256
READ_BLOCK = 1 << 20
# The marks stand within this many bytes of a book's beginning and end.
GUTENBERG_SPAN = 1 << 16
GUTENBERG_START = re.compile(rb"\*\*\* ?START OF TH(E|IS) PROJECT GUTENBERG EBOOK[^\n]*\n\s*", re.IGNORECASE)
GUTENBERG_END = re.compile(rb"\*\*\* ?END OF TH(E|IS) PROJECT GUTENBERG EBOOK", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: as it was read, not yet normalised.
        source: a label counted in the report.
        file, offset: the input's name and the byte or row where the record starts, for messages.
    """

    text: str
    source: str
    file: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Quarantined:
    """A record left out: the input's name, the byte or row where it starts, and why."""

    file: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Item:
    """One input of a work unit.

    Attributes:
        reader: "text", "book" (a text in the marks of Project Gutenberg), "jsonl", "parquet", "topic" or
            "part" (of a stream, fetch.py).
        name: what the user sees: path relative to the corpus, topic, data set.
        source: label of its documents.
        path: where it lies on this machine; no part of the content address.
        content: hash of the bytes that are read (content.py), or a part's own address; part of the content
            address.
        start, stop: bytes of a .txt or .jsonl file (whole lines), row groups of a .parquet, rows of a part.
        size: input bytes, for grouping and progress; of a part, bytes of text.
    """

    reader: str
    name: str
    source: str
    path: str
    content: str
    start: int
    stop: int
    size: int

    def address(self) -> list[Any]:
        """What decides this input's documents, as JSON."""
        return [self.reader, self.name, self.source, self.content, self.start, self.stop]


def read_item(item: Item, source: SourceConfig) -> Iterator[Document | Quarantined]:
    """Documents of one input in their order, with `Quarantined` in place of what cannot be one.

    Raises:
        OSError: the input vanished or the disk fails: no property of the text, so it is not quarantined.
    """
    return {
        "text": _read_text,
        "book": _read_text,
        "jsonl": read_lines,
        "parquet": _read_parquet,
        "topic": _read_topic,
        "part": _read_part,
    }[item.reader](item, source)


def checked(item: Item, text: object, offset: int, source: SourceConfig) -> Document | Quarantined:
    """A record's text as a document of `item`, or why it can be none."""
    if not isinstance(text, str):
        return Quarantined(item.name, offset, f"field {source.text_column!r} is missing or no text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Quarantined(item.name, offset, "lone surrogate in the text")
    if size > source.max_document_bytes:
        return Quarantined(item.name, offset, f"{size} bytes, more than {source.max_document_bytes}")
    if not text.strip("\0\r\n\t "):
        return Quarantined(item.name, offset, "no text")
    return Document(text, item.source, item.name, offset)


def _read_text(item: Item, source: SourceConfig) -> Iterator[Document | Quarantined]:
    span = (item.start, item.stop)
    offset, stop = book_span(item.path, *span) if item.reader == "book" else span
    limit, size = source.max_document_bytes, stop - offset
    if source.text_document_bytes is None and size > limit:
        yield Quarantined(item.name, 0, f"{size} bytes, more than {limit}")
        return
    with open(item.path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    for part in _cut(data, source.text_document_bytes):
        try:
            yield checked(item, part.decode(), offset, source)
        except UnicodeDecodeError as error:
            yield Quarantined(item.name, offset + error.start, f"not UTF-8 ({error.reason})")
        offset += len(part)


def book_span(path: str, start: int, stop: int) -> tuple[int, int]:
    """Of the bytes [start, stop) those between the marks that Project Gutenberg sets around a book.

    The marks are looked for in the whole file, whatever range is read; without marks it is all book.
    """
    with open(path, "rb") as file:
        head = file.read(GUTENBERG_SPAN)
        base = max(0, file.seek(0, io.SEEK_END) - GUTENBERG_SPAN)
        file.seek(base)
        tail = file.read()
    begin, end = GUTENBERG_START.search(head), GUTENBERG_END.search(tail)
    first = max(start, begin.end()) if begin else start
    return first, max(first, min(stop, base + end.start())) if end else max(first, stop)


def _cut(data: bytes, limit: int | None) -> Iterator[bytes]:
    """Consecutive parts of at most `limit` bytes, ending at a blank line, else a line, else a character."""
    start = 0
    while limit is not None and len(data) - start > limit:
        stop = start + limit
        for mark in (b"\n\n", b"\n", b" "):
            found = data.rfind(mark, start, stop)
            if found > start:
                stop = found + len(mark)
                break
        else:
            while stop > start + 1 and data[stop] & 0xC0 == 0x80:  # not inside a UTF-8 character
                stop -= 1
        yield data[start:stop]
        start = stop
    yield data[start:]


def read_lines(item: Item, source: SourceConfig, skip: int = 0) -> Iterator[Document | Quarantined]:
    """Records of a .jsonl file, compressed or not; the first `skip` of them are read, but not looked into.

    Raises:
        OSError: as `read_item`.
    """
    for found in islice(_lines(item, source), skip, None):
        yield found if isinstance(found, Quarantined) else _parse_line(item, *found, source)


def _lines(item: Item, source: SourceConfig) -> Iterator[tuple[bytes, int] | Quarantined]:
    """Lines that are not blank and where they begin, or what is wrong with them before they are parsed."""
    # A JSON escape takes up to six bytes per byte of text, and the record has other fields.
    limit = 8 * source.max_document_bytes + 4096
    compressed = not item.path.endswith(".jsonl")
    stop = max(EXPANSION_FLOOR, MAX_EXPANSION * item.size) if compressed else item.stop
    end = stop + compressed  # one byte more shows that there is more
    offset = item.start
    try:
        with _open_lines(item.path) as file:
            if offset:
                file.seek(offset)
            while offset < stop and (line := file.readline(min(limit + 1, end - offset))):
                size = len(line)
                if compressed and offset + size > stop:
                    yield Quarantined(item.name, offset, f"expands over {MAX_EXPANSION} times: rest left out")
                    return
                if size > limit:
                    size += skip_line(file, line, stop)
                    yield Quarantined(item.name, offset, f"record longer than {limit} bytes")
                elif line.strip():
                    yield line, offset
                offset += size
    except (EOFError, zlib.error, gzip.BadGzipFile, _zstd_error()) as error:
        yield Quarantined(item.name, offset, f"damaged compressed file, rest left out ({error})")


def _open_lines(path: str) -> Any:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    return io.BufferedReader(_ZstdFrames(path)) if path.endswith(".zst") else open(path, "rb")


class _ZstdFrames(io.RawIOBase):
    """The frames of a .zst file as one stream.

    The package's own stream reader takes a file that ends inside a frame for a complete one; this one raises
    EOFError.
    """

    # A block of n input bytes expands to at most n / 4 blocks of 128 KiB: 32 MiB for 1 KiB.
    BLOCK = 1024

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(self.BLOCK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError
    return zstandard.ZstdError


def skip_line(file: IO[bytes], line: bytes, most: int) -> int:
    """Read to the end of the line that `line` begins, or about `most` bytes; returns the bytes read."""
    skipped = 0
    while not line.endswith(b"\n") and skipped <= most:
        line = file.readline(1 << 20)
        if not line:
            break
        skipped += len(line)
    return skipped


def _parse_line(item: Item, line: bytes, offset: int, source: SourceConfig) -> Document | Quarantined:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Quarantined(item.name, offset + error.start, f"not UTF-8 ({error.reason})")
    except (ValueError, RecursionError) as error:
        return Quarantined(item.name, offset, f"not JSON ({error})")
    text = record.get(source.text_column) if isinstance(record, dict) else None
    return checked(item, text, offset, source)


def open_parquet(path: str) -> Any:
    """The file as a ``pyarrow.parquet.ParquetFile``, or the reason (a str) why it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        return f"not a parquet file ({str(error).splitlines()[0]})"


def _read_parquet(item: Item, source: SourceConfig) -> Iterator[Document | Quarantined]:
    import pyarrow

    file = open_parquet(item.path)
    if isinstance(file, str):
        yield Quarantined(item.name, 0, file)
        return
    if source.text_column not in file.schema_arrow.names:
        yield Quarantined(
            item.name, 0, f"no column {source.text_column!r}: {', '.join(file.schema_arrow.names)}"
        )
        return
    row = sum(file.metadata.row_group(i).num_rows for i in range(item.start))
    groups = list(range(item.start, item.stop))
    try:
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[source.text_column]):
            for value in batch.column(0):
                try:
                    yield checked(item, value.as_py(), row, source)
                except UnicodeDecodeError as error:
                    yield Quarantined(item.name, row, f"not UTF-8 ({error.reason})")
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield Quarantined(
            item.name, row, f"damaged parquet file, rest left out ({str(error).splitlines()[0]})"
        )


def _read_topic(item: Item, source: SourceConfig) -> Iterator[Document | Quarantined]:
    from pydoc_data.topics import topics

    yield checked(item, topics.get(item.path), 0, source)


def _read_part(item: Item, source: SourceConfig) -> Iterator[Document | Quarantined]:
    """What `fetch` has written and checked already: damage here is the disk's, and nothing to quarantine."""
    import zstandard

    row = item.start
    try:
        with open(item.path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            for line in io.BufferedReader(stream, READ_BLOCK):
                record = json.loads(line)
                if "text" in record:
                    yield Document(record["text"], item.source, item.name, record["row"])
                else:
                    yield Quarantined(item.name, record["row"], record["reason"])
                row += 1
    except (zstandard.ZstdError, ValueError, KeyError) as error:
        raise OSError(f"{item.path} is damaged ({error}): run prepare again") from error
    if row != item.stop:
        raise OSError(f"{item.path} is damaged (row {row} of {item.stop} is missing): run prepare again")


def load_streaming(source: SourceConfig) -> Any:
    """The data set as a streaming ``datasets.IterableDataset``; nothing from the repository is executed.

    Raises:
        ValueError: no such data set, subset, split or revision, no network, or no text column; the message
            says which.
    """
    import datasets

    named = f"{source.name}, subset {source.subset}, split {source.split}, revision {source.revision}"
    try:
        stream = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:  # its file systems and readers have a hundred kinds
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise ValueError(f"data.source: cannot open data set {named}: {reason}") from error
    if stream.column_names is not None and source.text_column not in stream.column_names:
        columns = ", ".join(stream.column_names)
        raise ValueError(f"data.source.text_column = {source.text_column!r}: {source.name} has {columns}")
    return stream
