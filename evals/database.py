"""The file behind the evaluation queue: SQLite in WAL mode, its tables, and upgrades of older files in place.

Every call opens a connection of its own, so threads and processes of one machine may share a file; one server
process owns it, because WAL does not work over a network.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Database", "as_json", "store_result"]

_FIRST = (
    """CREATE TABLE IF NOT EXISTS jobs (
      key TEXT PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, state TEXT NOT NULL,
      priority INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0,
      owner TEXT, lease_until REAL, error TEXT, created REAL NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, priority DESC, created)",
    """CREATE TABLE IF NOT EXISTS results (
      key TEXT PRIMARY KEY REFERENCES jobs (key), record TEXT NOT NULL, created REAL NOT NULL)""",
)
_SECOND = (
    "ALTER TABLE jobs ADD COLUMN tokens INTEGER",
    "CREATE INDEX jobs_by_age ON jobs (created DESC, key)",
    "CREATE INDEX results_by_age ON results (created DESC, key)",
    """CREATE TABLE samples (
      key TEXT NOT NULL REFERENCES results (key), place INTEGER NOT NULL, id TEXT NOT NULL, grp TEXT NOT NULL,
      score REAL NOT NULL, body TEXT NOT NULL, PRIMARY KEY (key, place))""",
    "CREATE INDEX samples_by_id ON samples (key, grp, id, score)",
    """CREATE TABLE scalars (
      key TEXT NOT NULL REFERENCES results (key), name TEXT NOT NULL, value REAL NOT NULL,
      PRIMARY KEY (key, name))""",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
)
# A key's result counts wherever its checkpoint is; before, a job knew one place of it.
_THIRD = (
    """CREATE TABLE places (
      run TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, key TEXT NOT NULL REFERENCES jobs (key),
      digest TEXT, identity TEXT, tokens INTEGER, created REAL NOT NULL, scored REAL,
      PRIMARY KEY (run, step, task, key)) WITHOUT ROWID""",
    "CREATE INDEX places_by_key ON places (key)",
    "CREATE INDEX places_by_age ON places (scored DESC, run, step, task)",
    "CREATE INDEX places_by_identity ON places (run, identity)",
    "DROP INDEX results_by_age",
    """INSERT INTO places (run, step, task, key, tokens, created, scored)
      SELECT jobs.run, jobs.step, jobs.task, jobs.key, jobs.tokens, jobs.created, results.created
      FROM jobs LEFT JOIN results USING (key)""",
)


class Database:
    """One file, of the newest schema once this object is there.

    Args:
        path: created when missing; upgraded in place when an older version wrote it.

    Raises:
        ValueError: the file is of a newer version, or is no database.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.writing() as connection:
                _upgrade(connection, path)
            self._open = self._hold_open()
        except sqlite3.DatabaseError as error:
            if "not a database" not in str(error):
                raise
            raise ValueError(f"{path} is no SQLite database: move it away, or name another file") from None

    def _hold_open(self) -> sqlite3.Connection:
        """One that is never closed: the last one to close copies the log into the file, every time."""
        connection = sqlite3.connect(self.path, check_same_thread=False)
        connection.execute("SELECT COUNT(*) FROM jobs").fetchone()
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the only write lock from its first line on."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One unchanging view of the file; waits for no writer."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(begin)
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            connection.close()


def _run_all(connection: sqlite3.Connection, statements: tuple[str, ...]) -> None:
    for statement in statements:
        connection.execute(statement)


def _to_first(connection: sqlite3.Connection) -> None:
    """What versions before the numbering wrote has these tables already."""
    _run_all(connection, _FIRST)


def _to_second(connection: sqlite3.Connection) -> None:
    """Samples and scalars leave the records for tables of their own."""
    _run_all(connection, _SECOND)
    for key, record, created in connection.execute("SELECT key, record, created FROM results").fetchall():
        connection.execute("DELETE FROM results WHERE key = ?", (key,))
        store_result(connection, key, json.loads(record), created=created)


def _to_third(connection: sqlite3.Connection) -> None:
    """Every place of a key is a row."""
    _run_all(connection, _THIRD)


_UPGRADES: tuple[Callable[[sqlite3.Connection], None], ...] = (_to_first, _to_second, _to_third)


def _upgrade(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_UPGRADES):
        raise ValueError(
            f"{path} has schema {version}, and this version knows up to {len(_UPGRADES)}: update "
            "trellis-dist, or name another file"
        )
    for upgrade in _UPGRADES[version:]:
        upgrade(connection)
    if version < len(_UPGRADES):
        connection.execute(f"PRAGMA user_version = {len(_UPGRADES)}")


def store_result(
    connection: sqlite3.Connection, key: str, record: Mapping[str, Any], *, created: float
) -> bool:
    """Keep a record, its samples and its scalars in their tables; False when the key has a result already.

    Args:
        connection: in a write transaction.
        key: of a job.
        record: with "result" (its "samples" go to their own table) and "scalars".
        created: seconds since 1970.
    """
    result = record.get("result")
    samples = result.get("samples", []) if isinstance(result, Mapping) else []
    kept = dict(record)
    if isinstance(result, Mapping):
        kept["result"] = {name: value for name, value in result.items() if name != "samples"}
    added = connection.execute(
        "INSERT OR IGNORE INTO results (key, record, created) VALUES (?, ?, ?)", (key, as_json(kept), created)
    )
    if added.rowcount != 1:
        return False
    connection.executemany(
        "INSERT INTO samples (key, place, id, grp, score, body) VALUES (?, ?, ?, ?, ?, ?)",
        [(key, place, *_sample(place, sample)) for place, sample in enumerate(samples)],
    )
    scalars = record.get("scalars", {})
    connection.executemany(
        "INSERT INTO scalars (key, name, value) VALUES (?, ?, ?)",
        [(key, name, value) for name, value in scalars.items() if value is not None and math.isfinite(value)],
    )
    return True


def _sample(place: int, body: Mapping[str, Any]) -> tuple[str, str, float, str]:
    """Id, group, score and text of a row; samples of the first schema had neither id nor group nor score."""
    whole = {
        "id": str(place),
        "group": str(body.get("length", "")),
        "score": float(body.get("generated", 0.0)),
        "prompt": "",
        **body,
    }
    return whole["id"], whole["group"], whole["score"], as_json(whole)


def as_json(value: Any) -> str:
    """JSON with sorted keys that every reader takes: NaN and infinities become null, half characters "?"."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_finite(value), sort_keys=True, ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
