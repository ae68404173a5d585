"""The study's corpus: ten novels in three splits by book, and the data set made of the first of them.

A book is what lies between Project Gutenberg's marks, normalised as the data pipeline normalises every
document, without the lines in which the edition names its makers. ``books.toml`` names the splits and the
hash of each text: another edition of a book is another study, and is refused.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from data_pipeline.job import prepare
from data_pipeline.manifest import Manifest
from data_pipeline.normalize import normalize
from launch.experiments.runs import assignments
from launch.recipe import load_recipe
from trellis_dist.files import atomic_write

__all__ = ["BASE", "SPLITS", "Book", "Split", "find_books", "parts_of", "prepare_books", "stripped"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TABLE = Path(__file__).with_name("books.toml")

BASE = Path(__file__).with_name("base.toml")

_START = re.compile(r"\A.*?\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^\n]*\n", re.DOTALL)
_END = re.compile(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*\Z", re.DOTALL)
_MAKERS = re.compile(
    r"\A\s*(?:Produced by|E-text prepared by|An Anonymous Volunteer, and).*?\n\s*\n", re.DOTALL
)
_LAST_LINE = re.compile(r"\s*End of (?:the )?Project Gutenberg[^\n]*(?:\n[^\n]+)*\s*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Book:
    """One novel.

    Attributes:
        name: of the book, as in the tables.
        split: which split it belongs to.
        file: its name in the folder of books.
        sha256: of its stripped text in UTF-8.
    """

    name: str
    split: Split
    file: str
    sha256: str

    def read(self, folder: Path) -> str:
        """The stripped text.

        Raises:
            FileNotFoundError: the folder has no such file.
            ValueError: it is another edition.
        """
        path = folder / self.file
        if not path.is_file():
            raise FileNotFoundError(f"--books {folder} has no {self.file}: name the folder of the ten novels")
        text = stripped(path.read_bytes().decode())
        found = hashlib.sha256(text.encode()).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{path} is another text of {self.name} than the study's (sha256 {found[:12]}, not "
                f"{self.sha256[:12]}): use the files that {TABLE.name} names"
            )
        return text


def find_books(split: Split) -> list[Book]:
    """The books of a split, in the order of the table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [
        Book(name=name, split=split, file=entry["file"], sha256=entry["sha256"])
        for name, entry in table[split].items()
    ]


def stripped(raw: str) -> str:
    """The text between Project Gutenberg's marks, normalised, without the edition's own lines.

    Raises:
        ValueError: the marks are missing.
    """
    text = normalize(raw)
    if not (_START.search(text) and _END.search(text)):
        raise ValueError("a book lacks the marks of Project Gutenberg: use the files as they are downloaded")
    text = _END.sub("", _START.sub("", text, count=1))
    return _LAST_LINE.sub("", _MAKERS.sub("", text, count=1)).strip() + "\n"


def parts_of(text: str, count: int) -> list[str]:
    """``count`` consecutive parts of about equal length, cut after blank lines; "".join gives the text.

    Raises:
        ValueError: the text has no blank line where one is needed.
    """
    cuts = [0]
    for part in range(1, count):
        place = text.find("\n\n", len(text) * part // count)
        if place < 0 or place + 2 <= cuts[-1]:
            raise ValueError(f"a text of {len(text)} characters cannot be cut into {count} parts: use fewer")
        cuts.append(place + 2)
    cuts.append(len(text))
    return [text[begin:end] for begin, end in pairwise(cuts)]


def prepare_books(folder: Path, work: Path, *, progress: bool = True) -> Manifest:
    """Write the stripped training books below ``work`` and make tokenizer and shards of them.

    What is there already is used again.

    Raises:
        ValueError, OSError: as `Book.read` and `data_pipeline.job.prepare`.
    """
    texts = {book.file: book.read(folder) for book in find_books("train")}
    (work / "train").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = work / "train" / name
        if not path.is_file() or path.read_bytes() != text.encode():
            atomic_write(path, text)
    source = assignments({"data.source.path": str(work / "train")})
    recipe = load_recipe(str(BASE), source, dataset_dir=work / "data")
    return prepare(recipe.data, workers=2, progress=progress)
