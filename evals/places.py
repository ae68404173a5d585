"""Where a key's checkpoint is: every (run, step, task) that its result counts for.

A copied or renamed run has checkpoints of the same digests, so the same keys: one job and one result serve
all of its places. A place is a row from its submission on, and `scored` once its key has a result.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass

__all__ = ["NO_STEP", "Place", "adopt", "doubted", "forget", "is_noted", "mark_scored", "note", "places_of"]

# The step of a model that has none: a baseline.
NO_STEP = -1
# Seconds that tell two results apart.
_TICK = 1e-5
_COLUMNS = "run, step, task, key, digest, identity, tokens"
_THIS = "run = :run AND step = :step AND task = :task"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One task on one checkpoint of one run.

    Attributes:
        run, step, task: where.
        key: of its job and result.
        digest: of the checkpoint; None where a version before places queued it.
        identity: what stays the same in all checkpoints of one training; None where that is not known.
        tokens: it was trained on; None where that is not known.
    """

    run: str
    step: int
    task: str
    key: str
    digest: str | None = None
    identity: str | None = None
    tokens: int | None = None

    def values(self) -> dict[str, str | int | None]:
        """By column."""
        return dict(zip(_COLUMNS.split(", "), astuple(self)))


def is_noted(connection: sqlite3.Connection, place: Place) -> bool:
    """Whether `note` would change nothing."""
    query = (
        "SELECT digest IS :digest AND identity IS :identity AND NOT EXISTS "
        "(SELECT 1 FROM places AS other WHERE other.run = :run AND other.step = :step AND other.task = :task "
        "AND (other.created > places.created OR other.scored > places.scored)) "
        f"FROM places WHERE {_THIS} AND key = :key"
    )
    row = connection.execute(query, place.values()).fetchone()
    return bool(row and row[0])


def note(connection: sqlite3.Connection, place: Place, *, now: float) -> None:
    """Keep a place of a job that is there; of several keys of one checkpoint's task the last noted counts.

    That is the one with the newest "created", and of those with a result the one with the newest "scored".
    """
    values = {**place.values(), "now": now}
    connection.execute(
        f"INSERT INTO places ({_COLUMNS}, created, scored) VALUES (:run, :step, :task, :key, :digest, "
        ":identity, :tokens, :now, (SELECT :now FROM results WHERE key = :key)) "
        "ON CONFLICT (run, step, task, key) DO UPDATE SET digest = COALESCE(excluded.digest, digest), "
        "identity = COALESCE(excluded.identity, identity), tokens = COALESCE(excluded.tokens, tokens)",
        values,
    )
    for column in ("created", "scored"):
        connection.execute(
            f"UPDATE places SET {column} = :now WHERE {_THIS} AND key = :key AND {column} < "
            f"(SELECT MAX({column}) FROM places WHERE {_THIS})",
            values,
        )


def adopt(connection: sqlite3.Connection, place: Place, *, now: float) -> None:
    """Keep a place that only a record tells of, if its key has a result; the rest is as at other places."""
    of_others = "(SELECT MAX({0}) FROM places WHERE places.key = jobs.key)"
    connection.execute(
        f"INSERT OR IGNORE INTO places ({_COLUMNS}, created, scored) SELECT :run, :step, task, key, "
        f"{of_others.format('digest')}, {of_others.format('identity')}, tokens, :now, :now "
        "FROM jobs JOIN results USING (key) WHERE key = :key AND task = :task",
        {**place.values(), "now": now},
    )


def mark_scored(connection: sqlite3.Connection, key: str, *, now: float) -> None:
    """The key has a result, and so have all of its places; before those of keys that were asked for later."""
    later = (
        f"SELECT MIN(other.scored) - {_TICK} FROM places AS other WHERE other.run = places.run AND "
        "other.step = places.step AND other.task = places.task AND other.created > places.created"
    )
    connection.execute(
        f"UPDATE places SET scored = MIN(:now, COALESCE(({later}), :now)) "
        "WHERE key = :key AND scored IS NULL",
        {"now": now, "key": key},
    )


def places_of(connection: sqlite3.Connection, key: str) -> list[Place]:
    """Every place of a key, by run and step."""
    query = f"SELECT {_COLUMNS} FROM places WHERE key = ? ORDER BY run, step"
    return _places(connection.execute(query, (key,)))


def doubted(connection: sqlite3.Connection, place: Place) -> list[Place]:
    """Places of the run that may be of an earlier training, now that ``place`` is known.

    Another digest at its step puts that step and the later ones in doubt; another identity, whatever has it;
    a step, what a baseline of that name has without one.
    """
    if place.digest is None:
        return []
    values = place.values()
    # Not "<>": this finds the others in the index, however many places have the same.
    other = "run = :run AND (identity < :identity OR identity > :identity)"
    query = f"SELECT {_COLUMNS} FROM places WHERE {other}"
    found = _places(connection.execute(query, values))
    if place.step != NO_STEP:  # a baseline had the name before the run
        query = f"SELECT {_COLUMNS} FROM places WHERE run = :run AND step = {NO_STEP}"
        found += _places(connection.execute(query, values))
    changed = "SELECT 1 FROM places WHERE run = :run AND step = :step AND digest <> :digest"
    if connection.execute(changed, values).fetchone():
        later = "run = :run AND step >= :step AND NOT (step = :step AND digest IS :digest)"
        found += _places(connection.execute(f"SELECT {_COLUMNS} FROM places WHERE {later}", values))
    return list(dict.fromkeys(found))


def _places(rows: Iterable[tuple[str, int, str, str, str | None, str | None, int | None]]) -> list[Place]:
    return [Place(**dict(zip(_COLUMNS.split(", "), row))) for row in rows]  # type: ignore[arg-type]


def forget(connection: sqlite3.Connection, places: Iterable[Place]) -> None:
    """Drop places; a job with another one left is done there, one without any goes unless it has a result."""
    for place in places:
        values = place.values()
        connection.execute(f"DELETE FROM places WHERE {_THIS} AND key = :key", values)
        connection.execute(
            "UPDATE jobs SET run = other.run, step = other.step FROM "
            "(SELECT run, step FROM places WHERE key = :key ORDER BY run, step LIMIT 1) AS other "
            "WHERE key = :key AND jobs.run = :run AND jobs.step = :step",
            values,
        )
        connection.execute(
            "DELETE FROM jobs WHERE key = :key AND NOT EXISTS (SELECT 1 FROM places WHERE key = :key) "
            "AND NOT EXISTS (SELECT 1 FROM results WHERE key = :key)",
            values,
        )
