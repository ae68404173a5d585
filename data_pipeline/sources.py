"""Sources: a corpus as a list of inputs in one fixed order, cut into content-addressed work units.

Planning looks at names and sizes; what a unit's inputs hold is hashed when its turn comes (`Unit.sealed`),
and no text is decoded here (readers.py does that, in the workers).
"""

from __future__ import annotations

import os
import platform
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.config import SourceConfig
from data_pipeline.content import content_of
from data_pipeline.readers import Item, open_parquet, skip_line
from trellis_dist.files import digest

__all__ = ["Unit", "describe", "listing", "plan_units"]

SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
# Tests, an application and a tool, tables, what was installed, caches; pydoc_data is read as topics.
STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"site-packages", "dist-packages", "__pycache__"}
)
# Written by whoever built or installed this Python, not part of the library.
STDLIB_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
REMEDIES = {
    "stdlib": "install all of Python (on Debian: libpython3-stdlib), or name a corpus with data.source.path",
    "path": "put text into the files at data.source.path, or name others",
}
# A .txt file without a newline for this long is cut at a character.
LONGEST_LINE = 2**20
# The title of a topic: a line and its underline.
TITLE = re.compile(r"[^\n]+\n([^\w\s])\1*\n")


@dataclass(frozen=True)
class Unit:
    """Inputs that one task turns into tokens."""

    items: tuple[Item, ...]

    def sealed(self) -> Unit:
        """The unit with the hash of what each input holds now. Raises OSError: one is gone."""
        return Unit(tuple(replace(item, content=item.content or _content(item)) for item in self.items))

    @property
    def inputs(self) -> str:
        """Hash of everything that is read; with the stage's config it is the unit's content address."""
        assert all(item.content for item in self.items), f"{self.name} is not sealed"
        return digest([item.address() for item in self.items])

    @property
    def size(self) -> int:
        """Input bytes."""
        return sum(item.size for item in self.items)

    @property
    def name(self) -> str:
        """For messages: the first input, and how many follow."""
        more = f" and {len(self.items) - 1} more" if len(self.items) > 1 else ""
        return f"{self.items[0].name}{more}"


def plan_units(source: SourceConfig, unit_bytes: int) -> list[Unit]:
    """The corpus as work units of about `unit_bytes` input bytes, in corpus order.

    For the kinds "stdlib" and "path"; the units of a streamed data set are its parts (fetch.py). An input
    larger than `unit_bytes` is a unit of its own.

    Raises:
        ValueError: the corpus is missing or holds nothing that can be read; the message has the remedy.
    """
    items = {"stdlib": _stdlib_items, "path": _path_items}[source.kind]
    units = [Unit(tuple(group)) for group in _group(items(source, unit_bytes), unit_bytes)]
    if not units:
        raise ValueError(f"data.source: the {source.kind} corpus is empty: {REMEDIES[source.kind]}")
    return units


def _group(items: Iterator[Item], unit_bytes: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    size = 0
    for item in items:
        if group and size + item.size > unit_bytes:
            yield group
            group, size = [], 0
        group.append(item)
        size += item.size
    if group:
        yield group


def describe(source: SourceConfig) -> dict[str, object]:
    """The corpus for the manifest: what it is, its licence, and for "stdlib" the Python it came from."""
    fields: dict[str, object] = {"kind": source.kind, "licence": source.licence}
    if source.kind == "stdlib":
        fields |= {"python": platform.python_version(), "licence": "PSF-2.0"}
    elif source.kind == "path":
        fields |= {"path": source.path}
    else:
        fields |= {key: getattr(source, key) for key in ("name", "subset", "revision", "split")}
    return fields


def listing(source: SourceConfig) -> str | None:
    """Hash of the files' names, sizes and times of change: a cheap sign that nothing was touched.

    None where there is nothing to list: a data set by name, or a corpus that is no longer there.
    """
    if source.kind == "path":
        root = Path(source.path or "")
        if not root.exists():
            return None
        return _stamps((_relative(path, root), path) for path, _ in _text_files(root))
    return _stamps(_stdlib_modules()) if source.kind == "stdlib" else None


def _stamps(files: Iterable[tuple[str, Path]]) -> str:
    found = ((name, path.stat()) for name, path in files)
    return digest([[name, status.st_size, status.st_mtime_ns] for name, status in found])


def _stdlib_modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root, STDLIB_LEFT_OUT):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and not any(part.startswith(STDLIB_LOCAL) for part in name.split("/")):
            yield name, path


def _stdlib_items(source: SourceConfig, unit_bytes: int) -> Iterator[Item]:
    for name, path in _stdlib_modules():
        if size := path.stat().st_size:
            yield _item("text", name, "modules", str(path), 0, size, size)
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        return
    for topic in _distinct(topics):
        yield _item("topic", f"topic {topic}", "topics", topic, 0, 0, max(1, len(topics[topic].encode())))


def _distinct(topics: Mapping[str, str]) -> Iterator[str]:
    """Sorted names of the topics whose text, the title aside, lies in no other topic.

    "if" is a part of "compound": with one of them held out, the model would be tested on what it has read.
    """
    bodies = {name: TITLE.sub("", topics[name], count=1).strip() for name in sorted(topics)}
    for name, body in bodies.items():
        others = ((key, other) for key, other in bodies.items() if key != name)
        if not any(body in other and (body != other or key < name) for key, other in others):
            yield name


def _item(reader: str, name: str, source: str, path: str, start: int, stop: int, size: int) -> Item:
    return Item(reader, name, source, path, "", start, stop, size)


def _content(item: Item) -> str:
    return content_of(item.reader, item.path, item.start, item.stop)


def _path_items(source: SourceConfig, unit_bytes: int) -> Iterator[Item]:
    root = Path(source.path or "")
    if not root.exists():
        raise ValueError(
            f"data.source.path = {str(root)!r} does not exist: name a folder or file with the corpus"
        )
    found = False
    for path, reader in _text_files(root):
        found = True
        yield from _file_items(path, _relative(path, root), reader, source, unit_bytes)
    if not found:
        raise ValueError(
            f"data.source.path = {str(root)!r} holds no text: it needs files ending in {', '.join(SUFFIXES)}"
        )


def _relative(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _text_files(root: Path) -> Iterator[tuple[Path, str]]:
    for path in [root] if root.is_file() else _walk(root):
        for suffix, reader in SUFFIXES.items():
            if path.name.endswith(suffix):
                yield path, reader
                break


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below `root`, each folder's sorted files before its sorted folders.

    Names that begin with a dot are left out, and so are the folders in `left_out`.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.exists() and stat.S_ISREG(path.stat().st_mode):
                yield path


def _file_items(path: Path, name: str, reader: str, source: SourceConfig, unit_bytes: int) -> Iterator[Item]:
    how = "book" if reader == "text" and source.strip_gutenberg else reader
    for start, stop, size in _ranges(path, reader, source, unit_bytes):
        yield _item(how, name, reader, str(path), start, stop, max(1, size))


def _ranges(path: Path, reader: str, source: SourceConfig, unit_bytes: int) -> Iterable[tuple[int, int, int]]:
    """(start, stop, bytes) of parts that can be read alone: lines of a .jsonl, row groups of a .parquet, and
    lines of a .txt that is cut into documents."""
    size = path.stat().st_size
    if path.name.endswith(".jsonl"):
        return _line_ranges(path, size, unit_bytes, longest=size)
    if reader == "text" and source.text_document_bytes is not None:
        return _line_ranges(path, size, max(unit_bytes, source.text_document_bytes), longest=LONGEST_LINE)
    if reader == "parquet":
        file = open_parquet(str(path))
        if not isinstance(file, str):
            groups = range(file.metadata.num_row_groups)
            return [(i, i + 1, file.metadata.row_group(i).total_byte_size) for i in groups]
    return [(0, size, size)]


def _line_ranges(path: Path, size: int, unit_bytes: int, *, longest: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of at least `unit_bytes` that end with a line, or with a character where it is too long."""
    start = 0
    with open(path, "rb") as file:
        while start < size:
            last = min(start + unit_bytes, size) - 1
            file.seek(last)
            stop = min(size, last + skip_line(file, b"", longest))
            file.seek(stop - 1)
            if stop < size and file.read(1) != b"\n":
                while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:  # not inside a UTF-8 character
                    stop += 1
            yield start, stop, stop - start
            start = stop
