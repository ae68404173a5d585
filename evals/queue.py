"""The evaluation queue: one row and at most one result per key.

A worker leases a job for some seconds and renews the lease while it works; the job of a worker that died is
leased again once its lease has run out, or sooner when its pool notices. Whoever finishes first stores the
result; a second result of the same key is dropped, so every key ends with exactly one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from evals.database import Database, store_result
from evals.places import Place, adopt, doubted, forget, is_noted, mark_scored, note, places_of

State = Literal["queued", "running", "done", "failed", "cancelled"]

MAX_ATTEMPTS = 3
# Wait before attempt n + 1 of a failed job: BACKOFF * 2**n seconds.
BACKOFF = 5.0

_COLUMNS = "key, run, step, task, state, priority, attempts, error, created, tokens"

__all__ = ["Queue", "QueueFullError", "QueuedJob", "State"]


class QueueFullError(RuntimeError):
    """As many jobs wait or run as there may be; try again when some are done."""


@dataclass(frozen=True)
class QueuedJob:
    """A row of the queue; ``key`` identifies (checkpoint digest, task, settings, tokenizer, data).

    ``tokens`` are those the checkpoint was trained on, None where that is not known.
    """

    key: str
    run: str
    step: int
    task: str
    state: State
    priority: int
    attempts: int
    error: str | None
    created: float
    tokens: int | None

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
        path: created when missing, upgraded when an older version wrote it.
        clock: seconds; tests pass their own.

    Raises:
        ValueError: as `Database`.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.database, self._clock = Database(path), clock

    def submit(
        self,
        key: str,
        *,
        run: str,
        step: int,
        task: str,
        priority: int = 0,
        tokens: int | None = None,
        digest: str | None = None,
        identity: str | None = None,
        room: int | None = None,
    ) -> bool:
        """Queue a job; False when it is there already (one that waits takes the higher of both priorities).

        A failed or cancelled one is queued again (True). Its result will count here, and at every place that
        it was submitted for before.

        Args:
            key, run, step, task, tokens: as in `QueuedJob`.
            priority: higher ones are leased first.
            digest, identity: as in `Place`.
            room: jobs that may wait or run; None sets no limit.

        Raises:
            QueueFullError: there is no room for one more.
        """
        place = Place(run=run, step=step, task=task, key=key, digest=digest, identity=identity, tokens=tokens)
        known = self.job(key)  # most are asked for again and again: no write lock for these
        settled = known is not None and (
            known.state == "done" or (known.active and known.priority >= priority)
        )
        if settled and self.is_noted(place):
            return False
        with self.database.writing() as database:
            row = database.execute("SELECT state FROM jobs WHERE key = ?", (key,)).fetchone()
            if row and row[0] not in ("failed", "cancelled"):
                database.execute(
                    "UPDATE jobs SET priority = MAX(priority, ?) WHERE key = ? AND state = 'queued'",
                    (priority, key),
                )
                note(database, place, now=self._clock())
                return False
            if room is not None and _waiting(database) >= room:
                raise QueueFullError(f"{room} jobs wait already: submit again when some are done")
            database.execute(
                "INSERT INTO jobs (key, run, step, task, state, priority, created, tokens) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = 'queued', "
                "run = excluded.run, step = excluded.step, priority = excluded.priority, attempts = 0, "
                "not_before = 0, error = NULL",
                (key, run, step, task, priority, self._clock(), tokens),
            )
            note(database, place, now=self._clock())
            _count(database, "submitted")
            return True

    def is_noted(self, place: Place) -> bool:
        """Whether a place is known as it is, and its key is the last of its checkpoint's task."""
        with self.database.reading() as database:
            return is_noted(database, place)

    def note(self, place: Place) -> None:
        """Keep a place of a job that is there, which itself stays as it is."""
        if not self.is_noted(place):
            with self.database.writing() as database:
                note(database, place, now=self._clock())

    def knows(self, run: str) -> bool:
        """Whether any place of a run is known."""
        with self.database.reading() as database:
            return bool(database.execute("SELECT 1 FROM places WHERE run = ? LIMIT 1", (run,)).fetchone())

    def adopt(self, places: Sequence[Place]) -> None:
        """Keep places whose key has a result, all or none; what else is known is of other places."""
        with self.database.writing() as database:
            for place in places:
                adopt(database, place, now=self._clock())

    def places(self, key: str) -> list[Place]:
        """Where the result of a key counts, by run and step."""
        with self.database.reading() as database:
            return places_of(database, key)

    def doubted(self, place: Place) -> list[Place]:
        """Places of the run that may be of an earlier training, now that ``place`` is known."""
        with self.database.reading() as database:
            return doubted(database, place)

    def forget(self, places: Sequence[Place]) -> None:
        """Drop places, and the jobs that no place needs and that have no result."""
        with self.database.writing() as database:
            forget(database, places)
            _count(database, "superseded", len(places))

    def move(self, key: str, run: str, step: int) -> None:
        """Have a job that waits or runs done at another of its places."""
        with self.database.writing() as database:
            database.execute(
                "UPDATE jobs SET run = ?, step = ? WHERE key = ? AND state IN ('queued', 'running')",
                (run, step, key),
            )

    def lease(self, owner: str, *, seconds: float) -> QueuedJob | None:
        """Take the next job: queued, or left by a worker whose lease ran out. None when there is none."""
        now = self._clock()
        with self.database.writing() as database:
            died = database.execute(
                "UPDATE jobs SET state = 'failed', error = 'its worker died in every attempt' "
                "WHERE state = 'running' AND lease_until <= ? AND attempts >= ?",
                (now, MAX_ATTEMPTS),
            )
            _count(database, "failed", died.rowcount)
            row = database.execute(
                "SELECT key, state FROM jobs WHERE (state = 'queued' AND not_before <= ?) "
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
            _count(database, "leased")
            _count(database, "leases_lost", int(row[1] == "running"))
            return _job(database, row[0])

    def renew(self, key: str, owner: str, *, seconds: float) -> bool:
        """Hold on to a lease; False when it was lost (the job went to another worker, or was cancelled)."""
        with self.database.writing() as database:
            changed = database.execute(
                "UPDATE jobs SET lease_until = ? WHERE key = ? AND owner = ? AND state = 'running'",
                (self._clock() + seconds, key, owner),
            )
            return changed.rowcount == 1

    def finish(self, key: str, record: Mapping[str, Any]) -> bool:
        """Store the result of a job, from whichever worker; False when it has one or was cancelled."""
        with self.database.writing() as database:
            job = _job(database, key)
            if job is None or job.state == "cancelled":
                _count(database, "results_dropped")
                return False
            now = self._clock()
            added = store_result(database, key, record, created=now)
            mark_scored(database, key, now=now)
            database.execute(
                "UPDATE jobs SET state = 'done', owner = NULL, error = NULL WHERE key = ?", (key,)
            )
            _count(database, "results_stored" if added else "results_dropped")
            return added

    def fail(self, key: str, owner: str, error: str) -> None:
        """Give a job back: tried again after a wait, or failed for good after ``MAX_ATTEMPTS``."""
        self._give_back("key = ? AND owner = ?", (key, owner), error, wait=BACKOFF)

    def release(self, owner: str, error: str) -> None:
        """Give back what a dead worker held: tried again at once, or failed for good as in `fail`."""
        self._give_back("owner = ?", (owner,), error, wait=0.0)

    def _give_back(self, where: str, values: tuple[str, ...], error: str, *, wait: float) -> None:
        with self.database.writing() as database:
            rows = database.execute(
                "UPDATE jobs SET error = ?, owner = NULL, not_before = ? + ? * (1 << attempts), "
                "state = CASE WHEN attempts >= ? THEN 'failed' ELSE 'queued' END "
                f"WHERE {where} AND state = 'running' RETURNING state",
                (error, self._clock(), wait, MAX_ATTEMPTS, *values),
            ).fetchall()
            _count(database, "failed", rows.count(("failed",)))
            _count(database, "retried", rows.count(("queued",)))

    def hand_back(self, owner: str) -> None:
        """Queue again what a worker held that is stopped for no fault of the job: no attempt is counted."""
        with self.database.writing() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', owner = NULL, attempts = attempts - 1 "
                "WHERE owner = ? AND state = 'running'",
                (owner,),
            )

    def release_all(self, error: str) -> None:
        """`release` for every owner: called when no worker can be left, before the first one starts."""
        self._give_back("1", (), error, wait=0.0)

    def overdue(self) -> set[str]:
        """Owners whose lease ran out: what should have renewed it is dead or does not get to run."""
        with self.database.reading() as database:
            query = "SELECT owner FROM jobs WHERE state = 'running' AND lease_until <= ?"
            return {owner for (owner,) in database.execute(query, (self._clock(),))}

    def cancel(self, key: str) -> bool:
        """Take a job out of the queue; a running one loses its lease. False when it was in neither state."""
        with self.database.writing() as database:
            changed = database.execute(
                "UPDATE jobs SET state = 'cancelled', owner = NULL "
                "WHERE key = ? AND state IN ('queued', 'running')",
                (key,),
            )
            _count(database, "cancelled", changed.rowcount)
            return changed.rowcount == 1

    def job(self, key: str) -> QueuedJob | None:
        """The job of a key, or None."""
        with self.database.reading() as database:
            return _job(database, key)

    def jobs(
        self,
        *,
        state: str | None = None,
        run: str | None = None,
        task: str | None = None,
        limit: int = 1000,
        offset: int = 0,
    ) -> tuple[list[QueuedJob], int]:
        """Newest first, of a state, a run and a task where they are given; and how many there are in all.

        A job is of every run that has a place of it, and is shown as the one of the run that was asked for.
        """
        wanted = {"state": state, "run": run, "task": task}
        given = {name: value for name, value in wanted.items() if value is not None}
        terms = {name: f"{name} = :{name}" for name in given}
        columns = _COLUMNS
        if run is not None:
            terms["run"] = "(run = :run OR key IN (SELECT key FROM places WHERE places.run = :run))"
            columns = _COLUMNS.replace("run", ":run", 1)
        where = " AND ".join(terms.values()) or "1"
        with self.database.reading() as database:
            query = f"SELECT {columns} FROM jobs WHERE {where} ORDER BY created DESC, key LIMIT {limit:d}"
            rows = database.execute(f"{query} OFFSET {offset:d}", given).fetchall()
            (total,) = database.execute(f"SELECT COUNT(*) FROM jobs WHERE {where}", given).fetchone()
        return [QueuedJob(*row) for row in rows], total

    def active(self) -> list[QueuedJob]:
        """All that wait or run, oldest first."""
        with self.database.reading() as database:
            query = f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('queued', 'running') ORDER BY created, key"
            return [QueuedJob(*row) for row in database.execute(query)]

    def counts(self) -> dict[str, int]:
        """Jobs per state."""
        with self.database.reading() as database:
            return dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())

    def scored(self) -> int:
        """Places that have a result."""
        with self.database.reading() as database:
            query = "SELECT COUNT(*) FROM places WHERE scored IS NOT NULL"
            return int(database.execute(query).fetchone()[0])

    def events(self) -> dict[str, int]:
        """What happened since the file was made: submitted, leased, results_stored, ..."""
        with self.database.reading() as database:
            return dict(database.execute("SELECT name, value FROM counters ORDER BY name").fetchall())


def _count(database: sqlite3.Connection, name: str, amount: int = 1) -> None:
    if amount:
        database.execute(
            "INSERT INTO counters (name, value) VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, amount),
        )


def _waiting(database: sqlite3.Connection) -> int:
    query = "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'running')"
    return int(database.execute(query).fetchone()[0])


def _job(database: sqlite3.Connection, key: str) -> QueuedJob | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE key = ?", (key,)).fetchone()
    return QueuedJob(*row) if row else None
