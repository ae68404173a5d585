"""Series as files hold them: a row a time step, comma-separated; a header and a date column may be there."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Series", "read_series"]

# What a first column is called that is no series: a time, or the index that data frames are written with.
TIMES = ("", "date", "datetime", "time", "timestamp", "index")
# What stands in a row of data where a value is missing or too large; no column is called so.
GAPS = ("", "nan", "na", "n/a", "null", "none", "-", "?", "inf", "-inf", "+inf", "infinity", "-infinity")


@dataclass(frozen=True)
class Series:
    """Attributes:
    names: of the channels, in the file's order.
    values: fp64 [rows, channels].
    """

    names: tuple[str, ...]
    values: Tensor


def read_series(path: Path) -> Series:
    """The series in a CSV file, also as ``.gz``.

    A first row names the columns if one of its fields does (`_is_header`). The first column is left out if
    it is a date or an index: no value of it is a number, or its name is blank or one of ``TIMES``.

    Raises:
        ValueError: no such file, or a row that is not numbers, as many as in the first; the message says
            which line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {what}; give the path of a CSV file with --data")
    try:
        rows = list(_rows(path))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}): give a CSV file, plain or .gz") from error
    header = bool(rows) and _is_header(rows[0][1])
    body = rows[1:] if header else rows
    if not body:
        raise ValueError(f"{path} holds no rows of numbers: give a CSV file with one row a time step")
    named = header and rows[0][1][0].strip().lower() in TIMES
    first = 1 if named or not any(_is_number(row[0]) for _, row in body) else 0
    width = len(body[0][1])
    names = rows[0][1][first:] if header else [str(index) for index in range(width - first)]
    values = [_numbers(path, line, row, width=width, first=first) for line, row in body]
    return Series(tuple(names), torch.tensor(values, dtype=torch.float64))


def _is_header(row: list[str]) -> bool:
    """Whether some field is a name: one behind the first, or the first, which as a date would have digits."""
    dated = any(letter.isdigit() for letter in row[0])
    return any(map(_is_name, row[1:])) or (_is_name(row[0]) and not dated)


def _is_name(field: str) -> bool:
    return not _is_number(field) and field.strip().lower() not in GAPS


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with their lines."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if row:
                yield reader.line_num, row


def _numbers(path: Path, line: int, row: list[str], *, width: int, first: int) -> list[float]:
    if len(row) != width or width == first:
        raise ValueError(f"{path}, line {line}: {len(row)} fields where {max(width, first + 1)} are expected")
    for field in row[first:]:
        if not _is_number(field):
            raise ValueError(f"{path}, line {line}: {field!r} is no finite number; fill gaps before")
    return [float(field) for field in row[first:]]


def _is_number(field: str) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False
