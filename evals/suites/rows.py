"""A suite's rows, from a folder of files or from the Hub at a pinned commit, and its questions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from evals.suites.catalogue import Suite
from evals.suites.question import Question
from evals.suites.schemas import Row, SchemaError
from trellis_dist.files import read_json

__all__ = ["find_file", "read_questions", "read_rows"]

ENDINGS = (".jsonl", ".json", ".parquet")


def find_file(folder: Path | str, suite: Suite) -> Path:
    """The suite's file in a folder. Raises ValueError unless there is exactly one."""
    folder = Path(folder)
    names = [stem + ending for stem in suite.files for ending in ENDINGS]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(path.name for path in found[:2])
        raise ValueError(f"evals.suites_folder = {folder} has {both} for {suite.name}: keep one of them")
    raise ValueError(f"evals.suites_folder = {folder} has no file for {suite.name}: give it {names[0]}")


def read_questions(folder: Path | str | None, suite: Suite, *, limit: int = 0) -> list[Question]:
    """The suite's questions in the order of its rows, each with its own id.

    Args:
        folder: holds the suite's file; None loads its data set from the Hub.
        suite: which.
        limit: how many of them; 0 takes all.

    Raises:
        ValueError: no file, no network, or a row that fits no schema (named with file and line).
    """
    rows = hub_rows(suite) if folder is None else read_rows(find_file(folder, suite))
    questions, seen = [], dict[str, int]()
    for place, row in islice(rows, limit or None):
        question = _read(suite, place, row)
        seen[question.id] = number = seen.get(question.id, 0) + 1
        questions.append(question if number == 1 else replace(question, id=f"{question.id}-{number}"))
    if not questions:
        raise ValueError(f"{find_file(folder, suite) if folder else suite.hub.name} has no rows")
    return questions


def _read(suite: Suite, place: str, row: Any) -> Question:
    try:
        if not isinstance(row, dict):
            raise SchemaError("not an object")
        return suite.read(row)
    except SchemaError as error:
        raise ValueError(f"{place}: {error}; a row of {suite.name} has {suite.expects}") from None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of a .jsonl, .json (one list) or .parquet file.

    Raises:
        ValueError: the file is not what its ending says.
    """
    if path.suffix == ".jsonl":
        yield from _lines(path)
        return
    rows = _parquet(path) if path.suffix == ".parquet" else read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no list: give a JSON list of rows, or one row a line as .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}, line {number} is not JSON ({error}): one row a line") from None
            yield f"{path}, line {number}", row


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file ({_line(error)})") from error
    return rows


def hub_rows(suite: Suite) -> Iterator[tuple[str, Row]]:
    """(place, row) of the suite's data set at its pinned commit; nothing from the repository is executed.

    Raises:
        ValueError: it cannot be loaded, for want of a network, say.
    """
    import datasets

    hub = suite.hub
    try:
        rows = datasets.load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision)
    except Exception as error:  # its file systems and readers have a hundred kinds
        raise ValueError(
            f"{hub.name}@{hub.revision[:7]} cannot be loaded ({_line(error)}): set evals.suites_folder to a "
            f"folder with {suite.files[0]}.jsonl"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{hub.name}@{hub.revision[:7]}, row {number}", row


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
