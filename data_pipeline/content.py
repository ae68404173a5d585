"""What an input holds, as a hash: of the same bytes when it is planned and after it was read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.readers import Item, book_span, open_parquet
from trellis_dist.files import digest, sha256_file

__all__ = ["check_unchanged", "content_of"]


def content_of(reader: str, path: str, start: int, stop: int) -> str:
    """Hash of the bytes that `reader` makes documents of; arguments as in `Item`. Raises OSError."""
    if reader == "topic":
        from pydoc_data.topics import topics

        return digest(topics.get(path))
    if reader == "parquet" and not isinstance(file := open_parquet(path), str):
        return _row_group(path, file.metadata, start)
    if reader == "book":  # marks elsewhere in the file decide what of the range is text
        span = book_span(path, start, stop)
        return digest([*span, sha256_file(Path(path), start=span[0], stop=span[1])])
    if reader == "text" or path.endswith(".jsonl"):
        return sha256_file(Path(path), start=start, stop=stop)
    return sha256_file(Path(path))


def _row_group(path: str, metadata: Any, index: int) -> str:
    """Hash of one row group's column chunks, and of the footer that says how to read them."""
    group = metadata.row_group(index)
    hashes = []
    for column in map(group.column, range(group.num_columns)):
        pages = [column.dictionary_page_offset or column.data_page_offset, column.data_page_offset]
        start = max(0, min(pages))
        hashes.append(sha256_file(Path(path), start=start, stop=start + column.total_compressed_size))
    footer = max(0, Path(path).stat().st_size - metadata.serialized_size - 8)
    return digest([*hashes, sha256_file(Path(path), start=footer)])


def check_unchanged(items: Iterable[Item]) -> None:
    """Compare inputs that were read with their hashes in the plan.

    A part of a stream was verified when it was looked up, and its reader sees damage.

    Raises:
        OSError: an input is another one than was planned, or is gone; the message names it.
    """
    for item in items:
        if item.reader == "part":
            continue
        if content_of(item.reader, item.path, item.start, item.stop) != item.content:
            why = " (or this node has another Python)" if item.reader == "topic" else ""
            raise OSError(f"{item.name} changed while the job ran{why}: run prepare again")
