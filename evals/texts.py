"""A named text: its documents, as every model reads them, and the digest of what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

__all__ = ["read_documents", "text_digest"]

ENDINGS = (".txt", ".jsonl")


def read_documents(path: Path | str) -> list[str]:
    """The documents of a file, or of a folder's files in the order of their names, folders below included.

    A .txt file is one document, byte for byte; of a .jsonl file every line is one, under "text". Empty ones
    are left out.

    Raises:
        ValueError: there is none, or a file is not what its ending says; the message has its line.
        OSError: no such file or folder.
    """
    path = Path(path)
    documents = [text for file in _files(path) for text in _documents(file) if text]
    if not documents:
        raise ValueError(
            f"evals.perplexity_text = {path}: holds no text; name .txt or .jsonl files with some"
        )
    return documents


def text_digest(path: Path | str) -> str:
    """SHA-256 of the documents in their order; the names of the files are no part of it.

    Raises:
        ValueError, OSError: as `read_documents`.
    """
    path = Path(path)
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(path)]
    return _digest(path, tuple(stamps))


@lru_cache(maxsize=8)
def _digest(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Remembered while the files stay as they are: a service asks for it with every job."""
    total = hashlib.sha256()
    for text in read_documents(path):
        total.update(hashlib.sha256(text.encode()).digest())  # each apart: where one ends is part of it
    return total.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file()]
        return sorted(found, key=lambda file: file.relative_to(path).as_posix())
    if not path.is_file():
        raise FileNotFoundError(f"evals.perplexity_text = {path}: no such file or folder; name one of text")
    if path.suffix not in ENDINGS:
        raise ValueError(f"evals.perplexity_text = {path}: name a .txt or .jsonl file, or a folder of them")
    return [path]


def _documents(file: Path) -> Iterator[str]:
    try:
        text = file.read_bytes().decode()  # line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"evals.perplexity_text: {file} is not UTF-8 ({error})") from None
    if file.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _field(file, number, line)


def _field(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # an escape may stand for half a character
    except (ValueError, KeyError, TypeError, AttributeError):
        where = f"evals.perplexity_text: {file}, line {number}"
        raise ValueError(f'{where}: write {{"text": "a document"}}, in whole characters') from None
    return str(text)
