"""The evaluation queue: SQLite in WAL mode, one row and at most one result per key.

A worker leases a job for some seconds and renews the lease while it works; the job of a worker that died is
leased again once its lease has run out. Whoever finishes first stores the result; a second result of the same
key is dropped, so every key ends with exactly one.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["queued", "running", "done", "failed", "cancelled"]

MAX_ATTEMPTS = 3
# Wait before attempt n + 1 of a failed job: BACKOFF * 2**n seconds.
BACKOFF = 5.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  key TEXT PRIMARY KEY, run TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0,
  owner TEXT, lease_until REAL, error TEXT, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, priority DESC, created);
CREATE TABLE IF NOT EXISTS results (
  key TEXT PRIMARY KEY REFERENCES jobs (key), record TEXT NOT NULL, created REAL NOT NULL);
"""
_COLUMNS = "key, run, step, task, state, priority, attempts, error, created"

__all__ = ["Queue", "QueuedJob", "State"]


@dataclass(frozen=True)
class QueuedJob:
    """A row of the queue; ``key`` identifies (checkpoint digest, task, settings, tokenizer, data)."""

    key: str
    run: str
    step: int
    task: str
    state: State
    priority: int
    attempts: int
    error: str | None
    created: float

    @property
    def active(self) -> bool:
        """Whether it still waits or runs."""
        return self.state in ("queued", "running")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Queue:
    """One database file; each call is one transaction, so processes and threads may share the file.

    Args:
        path: created when missing.
        clock: seconds; tests pass their own.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._transaction() as database:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction on a connection of its own: nothing is shared between threads."""
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA foreign_keys=ON")
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        finally:
            database.close()

    def submit(self, key: str, *, run: str, step: int, task: str, priority: int = 0) -> bool:
        """Queue a job; False when it is there already. A failed or cancelled one is queued again (True)."""
        with self._transaction() as database:
            row = database.execute("SELECT state FROM jobs WHERE key = ?", (key,)).fetchone()
            if row and row[0] not in ("failed", "cancelled"):
                return False
            database.execute(
                "INSERT INTO jobs (key, run, step, task, state, priority, created) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET state = 'queued', attempts = 0, not_before = 0, error = NULL",
                (key, run, step, task, priority, self._clock()),
            )
            return True

    def lease(self, owner: str, *, seconds: float) -> QueuedJob | None:
        """Take the next job: queued, or left by a worker whose lease ran out. None when there is none."""
        now = self._clock()
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'failed', error = 'its worker died in every attempt' "
                "WHERE state = 'running' AND lease_until <= ? AND attempts >= ?",
                (now, MAX_ATTEMPTS),
            )
            row = database.execute(
                "SELECT key FROM jobs WHERE (state = 'queued' AND not_before <= ?) "
                "OR (state = 'running' AND lease_until <= ?) ORDER BY priority DESC, created, key LIMIT 1",
                (now, now),
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET state = 'running', owner = ?, lease_until = ?, attempts = attempts + 1 "
                "WHERE key = ?",
                (owner, now + seconds, row[0]),
            )
            return _job(database, row[0])

    def renew(self, key: str, owner: str, *, seconds: float) -> bool:
        """Hold on to a lease; False when it was lost (the job went to another worker, or was cancelled)."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET lease_until = ? WHERE key = ? AND owner = ? AND state = 'running'",
                (self._clock() + seconds, key, owner),
            )
            return changed.rowcount == 1

    def finish(self, key: str, record: Mapping[str, Any]) -> bool:
        """Store the result of a job, from whichever worker; False when it has one or was cancelled."""
        with self._transaction() as database:
            job = _job(database, key)
            if job is None or job.state == "cancelled":
                return False
            added = database.execute(
                "INSERT OR IGNORE INTO results (key, record, created) VALUES (?, ?, ?)",
                (key, json.dumps(record, sort_keys=True), self._clock()),
            )
            database.execute(
                "UPDATE jobs SET state = 'done', owner = NULL, error = NULL WHERE key = ?", (key,)
            )
            return added.rowcount == 1

    def fail(self, key: str, owner: str, error: str) -> None:
        """Give a job back: tried again after a wait, or failed for good after ``MAX_ATTEMPTS``."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET error = ?, owner = NULL, not_before = ? + ? * (1 << attempts), "
                "state = CASE WHEN attempts >= ? THEN 'failed' ELSE 'queued' END "
                "WHERE key = ? AND owner = ? AND state = 'running'",
                (error, self._clock(), BACKOFF, MAX_ATTEMPTS, key, owner),
            )

    def cancel(self, key: str) -> bool:
        """Take a job out of the queue; a running one loses its lease. False when it was in neither state."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET state = 'cancelled', owner = NULL "
                "WHERE key = ? AND state IN ('queued', 'running')",
                (key,),
            )
            return changed.rowcount == 1

    def job(self, key: str) -> QueuedJob | None:
        """The job of a key, or None."""
        with self._transaction() as database:
            return _job(database, key)

    def jobs(self, *, limit: int = 1000) -> list[QueuedJob]:
        """Newest first."""
        with self._transaction() as database:
            query = f"SELECT {_COLUMNS} FROM jobs ORDER BY created DESC, key LIMIT ?"
            return [QueuedJob(*row) for row in database.execute(query, (limit,))]

    def active(self) -> list[QueuedJob]:
        """All that wait or run, oldest first."""
        with self._transaction() as database:
            query = f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('queued', 'running') ORDER BY created, key"
            return [QueuedJob(*row) for row in database.execute(query)]

    def results(self, *, limit: int = 1000) -> list[dict[str, Any]]:
        """Run, step, task and record of finished jobs, newest first."""
        query = (
            "SELECT jobs.run, jobs.step, jobs.task, jobs.key, results.record FROM results "
            "JOIN jobs USING (key) ORDER BY results.created DESC, jobs.key LIMIT ?"
        )
        with self._transaction() as database:
            names = ("run", "step", "task", "key")
            return [
                {**dict(zip(names, row)), "record": json.loads(row[4])}
                for row in database.execute(query, (limit,))
            ]

    def counts(self) -> dict[str, int]:
        """Jobs per state."""
        with self._transaction() as database:
            return dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())


def _job(database: sqlite3.Connection, key: str) -> QueuedJob | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE key = ?", (key,)).fetchone()
    return QueuedJob(*row) if row else None
