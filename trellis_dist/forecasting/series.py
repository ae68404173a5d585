"""Series as files hold them: a row a time step, comma-separated; a header and a date column may be there."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Series", "read_series"]


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

    A first row in which no field after the first is a number names the columns; a first column that is no
    number (a date) is left out.

    Raises:
        ValueError: no such file, or a row that is not numbers, as many as in the first; the message says
            which line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a CSV file with --data")
    try:
        rows = list(_rows(path))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}): give a CSV file, plain or .gz") from error
    header = bool(rows) and not any(_is_number(field) for field in rows[0][1][1:] or rows[0][1])
    body = rows[1:] if header else rows
    if not body:
        raise ValueError(f"{path} holds no rows of numbers: give a CSV file with one row a time step")
    first = 0 if _is_number(body[0][1][0]) else 1
    width = len(body[0][1])
    names = rows[0][1][first:] if header else [str(index) for index in range(width - first)]
    values = [_numbers(path, line, row, width=width, first=first) for line, row in body]
    return Series(tuple(names), torch.tensor(values, dtype=torch.float64))


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with their lines."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
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
