"""Documents that hold text of the evaluation sets: n words in a row in common (13 in GPT-3's appendix C).

A word is a run of letters or digits, lower case. Punctuation and "_" (emphasis in plain text) part words;
soft hyphens and characters without width do not. Documents come normalised, so evaluation sets are too.

    evaluation file -> strings, normalised -> numbers of the words -> hash of every n words -> table
    document -> numbers of the words (0: no evaluation set has it) -> hashes -> look-up -> words compared

`EvaluationNgrams.save` writes JSON: the vocabulary, and of each string its source and its words' numbers.
Hashes are made when it is read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import NormalizeConfig
from data_pipeline.normalize import normalize as normalized
from data_pipeline.words import windows
from trellis_dist.files import atomic_write

__all__ = ["VERSION", "EvaluationNgrams", "Match"]

# Part of the content address: raise it when `find` or the file changes.
VERSION = 2

WORD = re.compile(r"[^\W_]+")
# Soft hyphen, zero-width space and joiners, word joiner: nobody sees them inside a word.
UNSEEN = re.compile("[\u00ad\u200b-\u200d\u2060]")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".txt", ".parquet")
# Odd, so that a word at any place changes the hash (Knuth's constant for 64 bits).
BASE = np.uint64(6364136223846793005)
# The first look-up: at least this many bits of the hash, and this many places per n-gram.
FILTER_BITS, FILTER_ROOM = 16, 16
KEY = "data.decontaminate.paths"


@dataclass(frozen=True)
class Match:
    """An n-gram that a document shares with an evaluation set, and where it is there ("file.jsonl:17")."""

    ngram: str
    source: str


class EvaluationNgrams:
    """Every n-gram of the evaluation sets.

    Attributes:
        ngram_words: n.
        sources: where each string comes from: file, relative to the folder given, and row (from 1).
        skipped: strings of fewer than n words, or with a lone surrogate, which no document can hold.
    """

    def __init__(
        self,
        ngram_words: int,
        vocabulary: Sequence[str],
        texts: Sequence[tuple[str, Sequence[int]]],
        skipped: int,
    ) -> None:
        """`texts`: source and word numbers of each string; word k of the vocabulary has number k + 1."""
        self.ngram_words, self.skipped = ngram_words, skipped
        self.sources = [source for source, _ in texts]
        self._texts = list(texts)
        self._vocabulary = list(vocabulary)
        self._numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
        parts = [np.array(ids, np.uint64) for _, ids in texts]
        self._ids = np.concatenate([np.zeros(0, np.uint64), *parts])
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._build_table()

    def _build_table(self) -> None:
        hashes = _rolling(self._ids, self.ngram_words)
        at = np.arange(len(hashes))
        at = at[self._text_of(at) == self._text_of(at + self.ngram_words - 1)]  # inside one string
        order = np.argsort(hashes[at], kind="stable")
        self._at = at[order]  # int64 [n-grams]: where each begins in the words of all strings
        self._hashes = hashes[at][order]  # uint64 [n-grams], ascending
        # Whether a hash that begins with these bits exists: most words of a document need no more than this.
        self._bits = max(FILTER_BITS, (FILTER_ROOM * len(hashes)).bit_length())
        self._seen = np.zeros(2**self._bits, bool)
        self._seen[self._slots(self._hashes)] = True

    def _text_of(self, at: np.ndarray) -> np.ndarray:
        """Which string holds word `at` of all strings."""
        return np.searchsorted(self._ends, at, side="right")

    @classmethod
    def build(
        cls, paths: Sequence[str | Path], ngram_words: int, normalize: NormalizeConfig
    ) -> EvaluationNgrams:
        """Read evaluation sets: files, or folders of files in the order of their names.

        Every string in a record counts, at any depth, each by itself; in a .txt file, the whole file.

        Args:
            paths: files and folders.
            ngram_words: n.
            normalize: how the documents to compare were normalised.

        Raises:
            ValueError: a path that is missing, a folder without evaluation sets, a file that cannot be read.
        """
        numbers: dict[str, int] = {}
        texts: list[tuple[str, list[int]]] = []
        skipped = 0
        for source, text in _read_all(paths):
            try:
                words = _words(normalized(text, normalize))
            except UnicodeEncodeError:  # a lone surrogate
                words = []
            if len(words) < ngram_words:
                skipped += 1
            else:
                texts.append((source, [numbers.setdefault(word, len(numbers) + 1) for word in words]))
        return cls(ngram_words, list(numbers), texts, skipped)

    @cached_property
    def _content(self) -> bytes:
        fields = {
            "version": VERSION,
            "ngram_words": self.ngram_words,
            "skipped": self.skipped,
            "vocabulary": self._vocabulary,
            "texts": self._texts,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def sha256(self) -> str:
        """Hash of the file that `save` writes: the same evaluation sets give the same anywhere."""
        return hashlib.sha256(self._content).hexdigest()

    def save(self, path: Path) -> None:
        """Write one file, atomically. Raises OSError."""
        atomic_write(path, self._content)

    @classmethod
    def load(cls, path: Path) -> EvaluationNgrams:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for another file or version."""
        try:
            fields = json.loads(Path(path).read_bytes())
            if fields["version"] == VERSION:
                return cls(fields["ngram_words"], fields["vocabulary"], fields["texts"], fields["skipped"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no evaluation n-grams ({error!r}): remove it") from error
        raise ValueError(f"{path} has version {fields['version']}, not {VERSION}: remove it")

    def __len__(self) -> int:
        """Number of n-grams, equal ones counted each time."""
        return len(self._hashes)

    def find(self, text: str) -> Match | None:
        """The first n-gram of `text` that an evaluation set has, or None. Equal hashes are compared."""
        kept = np.zeros(0, np.uint64)
        for window in windows(text):
            words = _words(window)
            numbers = np.fromiter(map(self._numbers.get, words, repeat(0)), np.uint64, len(words))
            ids = np.concatenate([kept, numbers])
            match = self._find(ids)
            if match is not None:
                return match
            kept = ids[max(0, len(ids) - self.ngram_words + 1) :]  # n-grams that reach into the next window
        return None

    def _find(self, ids: np.ndarray) -> Match | None:
        hashes = _rolling(ids, self.ngram_words)
        starts = np.flatnonzero(self._seen[self._slots(hashes)])
        first = np.searchsorted(self._hashes, hashes[starts], side="left")
        last = np.searchsorted(self._hashes, hashes[starts], side="right")
        for found in np.flatnonzero(first < last):
            ngram = ids[starts[found] : starts[found] + self.ngram_words]
            for at in self._at[first[found] : last[found]]:
                if np.array_equal(self._ids[at : at + self.ngram_words], ngram):
                    words = " ".join(self._vocabulary[int(number) - 1] for number in ngram)
                    return Match(words, self.sources[int(self._text_of(at))])
        return None

    def _slots(self, hashes: np.ndarray) -> np.ndarray:
        slots: np.ndarray = hashes >> np.uint64(64 - self._bits)
        return slots


def _words(text: str) -> list[str]:
    return WORD.findall((text if text.isascii() else UNSEEN.sub("", text)).lower())


def _rolling(ids: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hash modulo 2**64 of every n numbers in a row: uint64 [words] to [max(0, words - n + 1)]."""
    size = max(0, len(ids) - n + 1)
    hashes = np.zeros(size, np.uint64)
    for place in range(n):
        hashes *= BASE
        hashes += ids[place : place + size]
    return hashes


def _read_all(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """Source and text of every string."""
    for path in map(Path, paths):
        for file, name in _files(path):
            try:
                for row, record in _records(file):
                    yield from ((f"{name}:{row}", text) for text in _strings(record))
            except Exception as error:  # each format's library raises its own
                reason = " ".join(str(error).split())
                raise ValueError(f"{KEY}: cannot read {file} ({reason}): repair or remove it") from error


def _files(path: Path) -> list[tuple[Path, str]]:
    """Evaluation files and the names that matches show."""
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{KEY}: {path} is none of {', '.join(SUFFIXES)}")
        return [(path, path.name)]
    if not path.is_dir():
        raise ValueError(f"{KEY}: there is no {path}")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    found = [(path / name, name) for name in names if name.endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"{KEY}: {path} holds none of {', '.join(SUFFIXES)}")
    return found


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Records with their numbers from 1: lines, items of a list, rows; a .txt file is one."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        batches = ParquetFile(file).iter_batches(1024)
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
        return
    text = _bytes(file).decode()
    if file.suffix == ".txt":
        yield 1, text
    elif file.suffix == ".json":
        value = json.loads(text)
        yield from enumerate(value if isinstance(value, list) else [value], start=1)
    else:
        for row, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield row, _line(line, row)


def _line(line: str, row: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {row} is no JSON: {error}") from error


def _bytes(file: Path) -> bytes:
    """Contents, unpacked. A file that ends too early raises EOFError."""
    data = file.read_bytes()
    if file.suffix == ".gz":
        return gzip.decompress(data)
    if file.suffix != ".zst":
        return data
    import zstandard

    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("the file ends inside a frame")
        data = frame.unused_data
    return b"".join(parts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
