"""Reading what is stored: tables of results, samples in pages, curves, heat maps, scores in pairs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.database import Database

__all__ = ["DEPTH_BINS", "MAX_POINTS", "Results"]

DEPTH_BINS = 10
# Points of all curves of one answer together, about: each keeps its last one.
MAX_POINTS = 50_000
_ROW = (
    "places.key, places.run, places.step, places.tokens, places.task, places.scored, "
    "json_extract(results.record, '$.seconds'), json_extract(results.record, '$.result.groups'), "
    "json_extract(results.record, '$.chance')"
)
_NAMES = ("key", "run", "step", "tokens", "task", "created", "seconds", "groups", "chance")
_DEPTH = f"json_extract(body, '$.depth') * {DEPTH_BINS}"
# What a person searches: the texts of a sample, not the names of its fields.
_TEXT = " || ' ' || ".join(
    f"COALESCE(json_extract(body, '$.{name}'), '')" for name in ("prompt", "answer", "output")
)


class Results:
    """Views of one database.

    Every method answers with plain values that `json.dumps` takes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self, *, run: str | None = None, task: str | None = None, limit: int = 1000, offset: int = 0
    ) -> tuple[list[dict[str, Any]], int]:
        """Results, newest first, without their records; and how many there are in all.

        A result is a row for each place of its checkpoint; "created" says since when it counts there.
        """
        where, given = _filters({"run": run, "task": task})
        where = f"scored IS NOT NULL AND {where}"
        order = "scored DESC, run, step, task, key"
        page = f"SELECT * FROM places WHERE {where} ORDER BY {order} LIMIT {limit:d} OFFSET {offset:d}"
        with self._database.reading() as database:
            query = f"SELECT {_ROW} FROM ({page}) AS places JOIN results USING (key) ORDER BY {order}"
            rows = database.execute(query, given).fetchall()
            (total,) = database.execute(f"SELECT COUNT(*) FROM places WHERE {where}", given).fetchone()
            return [_result(database, row) for row in rows], total

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a key without its samples, or None."""
        with self._database.reading() as database:
            row = database.execute("SELECT record FROM results WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def whole(self, key: str) -> dict[str, Any] | None:
        """The record of a key as its run folder has it, with its samples, or None."""
        record = self.record(key)
        if record is not None and isinstance(record.get("result"), dict):
            query = "SELECT body FROM samples WHERE key = ? ORDER BY place"
            with self._database.reading() as database:
                bodies = database.execute(query, (key,)).fetchall()
            if bodies:
                record["result"]["samples"] = [json.loads(body) for (body,) in bodies]
        return record

    def task(self, key: str) -> str | None:
        """The task of a key that has a result, or None."""
        with self._database.reading() as database:
            query = "SELECT task FROM jobs JOIN results USING (key) WHERE key = ?"
            row = database.execute(query, (key,)).fetchone()
        return str(row[0]) if row else None

    def samples(
        self,
        key: str,
        *,
        group: str | None = None,
        wrong: bool = False,
        search: str = "",
        depths: tuple[float | None, float | None] = (None, None),
        limit: int = 100,
        offset: int = 0,
    ) -> tuple[list[dict[str, Any]], int, list[str]]:
        """Samples of a result in the order of scoring, how many pass the filters, and all names of groups.

        Args:
            key: of the result.
            group: only samples of this group.
            wrong: only samples that were not entirely right.
            depths: only samples at such a depth: from the first, below the second (with 1, to the end); None
                sets no bound.
            search: only samples whose prompt, answer or output contains this; ASCII letters of any case.
            limit, offset: the page.
        """
        where, given = _filters({"key": key, "grp": group})
        where += " AND score < 1" if wrong else ""
        # The product that `heatmap` sorts into bins: there its edges are whole numbers.
        low, high = (None if bound is None else DEPTH_BINS * bound for bound in depths)
        if low is not None:
            where, given = f"{where} AND {_DEPTH} >= ?", (*given, low)
        if high is not None:
            last = "<=" if high >= DEPTH_BINS else "<"
            where, given = f"{where} AND {_DEPTH} {last} ?", (*given, high)
        if search:
            where += f" AND instr(lower({_TEXT}), lower(?)) > 0"
            given = (*given, search)
        with self._database.reading() as database:
            query = f"SELECT body FROM samples WHERE {where} ORDER BY place LIMIT {limit:d} OFFSET {offset:d}"
            rows = database.execute(query, given).fetchall()
            (total,) = database.execute(f"SELECT COUNT(*) FROM samples WHERE {where}", given).fetchone()
            groups = database.execute(
                "SELECT grp FROM samples WHERE key = ? GROUP BY grp ORDER BY MIN(place)", (key,)
            ).fetchall()
        return [json.loads(row[0]) for row in rows], total, [row[0] for row in groups]

    def pairs(
        self, first: str, second: str, *, group: str | None = None
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """By group: scores [n] of the first and of the second result on the samples that both have.

        A question is the same where its id, its prompt and its right answer are: the text of some prompts
        also depends on the tokenizer or on a file, and of a long one only the ends are kept.
        """
        question = "json_extract(body, '$.prompt') AS prompt, json_extract(body, '$.answer') AS answer"
        scores = (
            f"SELECT grp, id, {question}, AVG(score) AS score FROM samples WHERE key = ? GROUP BY 1, 2, 3, 4"
        )
        where, given = _filters({"a.grp": group})
        query = (
            f"SELECT a.grp, a.score, b.score FROM ({scores}) a JOIN ({scores}) b ON a.grp = b.grp "
            "AND a.id = b.id AND a.prompt IS b.prompt AND a.answer IS b.answer "
            f"WHERE {where} ORDER BY a.grp, a.id"
        )
        found: dict[str, list[tuple[float, float]]] = {}
        with self._database.reading() as database:
            for name, one, other in database.execute(query, (first, second, *given)):
                found.setdefault(name, []).append((one, other))
        arrays = {name: np.array(pairs, dtype=np.float64) for name, pairs in found.items()}
        return {name: (array[:, 0], array[:, 1]) for name, array in arrays.items()}

    def series(self, *, run: str | None = None, name: str | None = None) -> tuple[list[dict[str, Any]], int]:
        """Curves by run and scalar: points [step, tokens, value] by step, of each step the newest result.

        Of more than `MAX_POINTS` every curve keeps each second, third, ... point, and its last one.

        Returns:
            The curves, and how many points there are in all.
        """
        where, given = _filters({"places.run": run, "scalars.name": name})
        # SQLite takes the other columns from the row that holds the maximum.
        points = (
            "SELECT places.run, scalars.name, places.step, places.tokens, scalars.value, MAX(places.scored) "
            "FROM scalars JOIN places USING (key) "
            f"WHERE scored IS NOT NULL AND {where} GROUP BY 1, 2, 3"
        )
        query = (
            "SELECT run, name, step, tokens, value FROM (SELECT *, COUNT(*) OVER line AS size, "
            "ROW_NUMBER() OVER (line ORDER BY step) AS place "
            f"FROM ({points}) WINDOW line AS (PARTITION BY run, name)) "
            "WHERE (place - 1) % ? = 0 OR place = size ORDER BY run, name, step"
        )
        curves: dict[tuple[str, str], list[list[float | None]]] = {}
        with self._database.reading() as database:
            (total,) = database.execute(f"SELECT COUNT(*) FROM ({points})", given).fetchone()
            every = max(-(-total // MAX_POINTS), 1)
            for of_run, scalar, step, tokens, value in database.execute(query, (*given, every)):
                curves.setdefault((of_run, scalar), []).append([step, tokens, value])
        found = [{"run": of_run, "name": scalar, "points": p} for (of_run, scalar), p in curves.items()]
        return found, total

    def heatmap(self, key: str) -> dict[str, Any]:
        """Mean score in percent by prompt length and depth of what was asked for.

        Returns:
            "lengths" [L], "depths" the edges of the bins [B + 1], "cells" [L][B]: {"score", "samples"}, or
            None where no sample lies. All are empty for a task that varies neither.
        """
        depth = f"MIN(CAST({_DEPTH} AS INTEGER), {DEPTH_BINS - 1})"
        query = (
            f"SELECT json_extract(body, '$.length') AS length, {depth} AS bin, AVG(score), COUNT(*) "
            "FROM samples WHERE key = ? AND length IS NOT NULL AND bin IS NOT NULL "
            "GROUP BY 1, 2 ORDER BY 1, 2"
        )
        cells: dict[int, list[dict[str, float] | None]] = {}
        with self._database.reading() as database:
            for length, place, score, count in database.execute(query, (key,)):
                row = cells.setdefault(length, [None] * DEPTH_BINS)
                row[place] = {"score": 100 * score, "samples": count}
        edges = [i / DEPTH_BINS for i in range(DEPTH_BINS + 1)] if cells else []
        return {"lengths": list(cells), "depths": edges, "cells": list(cells.values())}


def _filters(wanted: Mapping[str, str | None]) -> tuple[str, tuple[Any, ...]]:
    given = {column: value for column, value in wanted.items() if value is not None}
    return " AND ".join(f"{column} = ?" for column in given) or "1", tuple(given.values())


def _result(database: sqlite3.Connection, row: tuple[Any, ...]) -> dict[str, Any]:
    """A row of the table of results, with its scalars and its groups."""
    found = dict(zip(_NAMES, row))
    for name in ("groups", "chance"):
        found[name] = json.loads(found[name] or "{}")
    query = "SELECT name, value FROM scalars WHERE key = ? ORDER BY name"
    found["scalars"] = dict(database.execute(query, (found["key"],)).fetchall())
    return found
