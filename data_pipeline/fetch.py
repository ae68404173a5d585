"""Stage "fetch": a stream becomes parts on this disk, small enough for one clean unit each.

    shard (streams.py) -> records -> part 0, part 1, ... -> clean units, in that order

A task reads one shard from its beginning to its end. It closes a part with the record that brings its text to
`unit_bytes`, and commits it like any other unit: what is in a part depends on the stream alone. A task that
is started again skips the records of the parts that are there. The stream cannot be entered in its middle, so
that reads the shard's first bytes once more, but it writes nothing and converts nothing for them.

A committed part holds

    records.jsonl.zst     {"row": n, "text": ...}, or {"row": n, "reason": ...} for what can be no document;
                          n counts the rows of a data set, and the bytes before a record of an archive
    unit.json             "first": number of the first record; "records"; "bytes" of text; "last": whether the
                          shard ends with it
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.commit import commit_unit, read_unit, unit_folder
from data_pipeline.progress import Bar
from data_pipeline.readers import Document, Item, Quarantined
from data_pipeline.run import Run
from data_pipeline.sources import Unit
from data_pipeline.streams import Shard
from trellis_dist.files import digest

__all__ = ["Fetched", "Want", "fetch", "fetch_shard", "part_key"]

RECORDS = "records.jsonl.zst"
# Raise when the code below, or in streams.py, or `readers.checked`, changes what a part contains.
VERSION = 1


def part_key(shard: Shard, part: int) -> str:
    """Content address of a part."""
    return digest([VERSION, *shard.address(part)])


def _part_unit(shard: Shard, part: int, entry: Mapping[str, Any], work: Path) -> Unit:
    """A committed part as a clean unit."""
    key, stop = part_key(shard, part), entry["first"] + entry["records"]
    path = str(unit_folder(work, "fetch", key) / RECORDS)
    size = max(1, entry["bytes"])
    return Unit((Item("part", shard.name, shard.label, path, key, entry["first"], stop, size),))


def fetch_shard(
    shard: Shard, part: int, row: int, limits: Mapping[str, float], work: str
) -> list[dict[str, Any]]:
    """Commit the parts of a shard from `part` on, before which are `row` records; none is made again.

    Args:
        limits: stop after the part that brings "bytes" of text, or "documents", to this many; empty: never.

    Returns:
        unit.json of each part, in order.

    Raises:
        OSError: the network, the file or its content failed on the way; the message names the shard. What
            cannot be read as a table of records (a damaged .parquet, a truncated .gz, broken JSON) of a data
            set is one of these, since its stream does not go on behind it; of an archive it is a record that
            says so. Committed parts stay.
    """
    records = _Records(shard, row)
    entries: list[dict[str, Any]] = []
    while not entries or not (entries[-1]["last"] or _reached(limits, _sums(entries))):
        key = part_key(shard, part + len(entries))
        entry = read_unit(unit_folder(work, "fetch", key))
        if entry is None:
            entry = commit_unit(work, "fetch", key, partial(_write_part, records, shard))
        else:
            records.skip(entry["records"])
        entries.append(entry)
    return entries


def _sums(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {
        "documents": sum(entry["records"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
    }


def _reached(limits: Mapping[str, float], sums: Mapping[str, int]) -> bool:
    return any(sums[name] >= limit for name, limit in limits.items())


def _write_part(records: _Records, shard: Shard, folder: Path) -> dict[str, Any]:
    import zstandard

    first, size = records.row, 0
    # With a checksum: a part that was damaged after it was verified is seen while it is read.
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    with open(folder / RECORDS, "xb") as file, compressor.stream_writer(file) as out:
        while size < shard.unit_bytes and not records.ended:
            found = records.take()
            record: dict[str, Any] = {"row": found.offset}
            if isinstance(found, Document):
                record["text"] = found.text
                size += len(found.text.encode())
            else:
                record["reason"] = found.reason
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    shard.check()
    return {"first": first, "records": records.row - first, "bytes": size, "last": records.ended}


class _Records:
    """The records of a shard from a row on; the stream is opened when the first one is wanted.

    Attributes:
        row: number of the next record.
    """

    def __init__(self, shard: Shard, row: int) -> None:
        self._shard, self.row = shard, row
        self._open = False
        self._found: Iterator[Document | Quarantined] = iter(())
        self._next: Document | Quarantined | None = None

    @property
    def ended(self) -> bool:
        """Whether no record is left; looks one ahead. Raises OSError as `fetch_shard`."""
        if not self._open:
            self._open, self._found = True, self._shard.records(self.row)
            self._next = next(self._found, None)
        return self._next is None

    def take(self) -> Document | Quarantined:
        """The next record, which there is."""
        found = self._next
        assert found is not None, "asked for a record behind the last"
        self.row += 1
        self._next = next(self._found, None)
        return found

    def skip(self, count: int) -> None:
        """Go on `count` records later."""
        if self._open:
            for _ in range(count):
                self.take()
        else:
            self.row += count


@dataclass
class Fetched:
    """What of a source's streams is on this disk, as far as it was asked for.

    Attributes:
        plan: the source in its order: shards, and units that need not be fetched.
        entries: unit.json of the leading parts, by the shard's place in the plan.
    """

    plan: list[Unit | Shard]
    entries: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def seal(self, place: int) -> Shard:
        """The shard at that place, from now on with the hash of what it holds. Raises OSError: it is gone."""
        shard = self.plan[place]
        assert not isinstance(shard, Unit), f"place {place} of the plan is no shard"
        self.plan[place] = sealed = shard.sealed()
        return sealed

    def ends(self, place: int) -> bool:
        """Whether all parts of a shard are here."""
        known = self.entries.get(place)
        return bool(known) and known[-1]["last"]  # type: ignore[index]

    @property
    def missing(self) -> list[int]:
        """Places of the shards that are not all here."""
        shards = (place for place, piece in enumerate(self.plan) if not isinstance(piece, Unit))
        return [place for place in shards if not self.ends(place)]

    def _leading(self) -> Iterator[tuple[Shard, int, dict[str, Any]] | Unit]:
        for place, piece in enumerate(self.plan):
            if isinstance(piece, Unit):
                yield piece
                continue
            yield from ((piece, part, entry) for part, entry in enumerate(self.entries.get(place, [])))
            if not self.ends(place):
                return

    def units(self, work: Path) -> list[Unit]:
        """The units that follow one another from the first, parts and others; more are only ever appended."""
        return [one if isinstance(one, Unit) else _part_unit(*one, work) for one in self._leading()]

    def sums(self, cleaned: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
        """ "documents" and "bytes" of `units`: of parts as fetched, of others as cleaned; 0 before any part.

        Args:
            cleaned: unit.json of the clean units, by number.
        """
        sums = nothing = _sums([])
        if any(self.entries.values()):
            for number, one in enumerate(self._leading()):
                found = cleaned.get(number, nothing) if isinstance(one, Unit) else _sums([one[2]])
                sums = {name: value + found[name] for name, value in sums.items()}
        return sums


@dataclass
class Want:
    """More of one source, in `work`: until a limit is reached, or all of it where there is none."""

    fetched: Fetched
    limits: Mapping[str, float]
    work: Path
    got: dict[str, int] = field(default_factory=lambda: _sums([]))

    @property
    def full(self) -> bool:
        """Whether this is enough."""
        return _reached(self.limits, self.got)

    def put(self, place: int, entry: dict[str, Any]) -> None:
        """The next part of a shard is here."""
        self.fetched.entries.setdefault(place, []).append(entry)
        for name, value in _sums([entry]).items():
            self.got[name] += value

    def look(self, place: int) -> bool:
        """Take the parts of a shard that are committed; returns whether it ends, or they are enough.

        Raises:
            OSError: it is gone, or it changed since it was planned.
        """
        shard, known = self.fetched.seal(place), self.fetched.entries.setdefault(place, [])
        while not (self.full or self.fetched.ends(place)):
            entry = read_unit(unit_folder(self.work, "fetch", part_key(shard, len(known))))
            if entry is None:
                return False
            self.put(place, entry)
        return True

    def call(self, place: int) -> tuple[Any, ...]:
        """Arguments of `fetch_shard` for what is missing of a shard that was looked for."""
        known = self.fetched.entries[place]
        row = known[-1]["first"] + known[-1]["records"] if known else 0
        left = {name: limit - self.got[name] for name, limit in self.limits.items()}
        return self.fetched.plan[place], len(known), row, left, str(self.work)


def fetch(wants: Sequence[Want], run: Run) -> None:
    """Fetch what is wanted: with limits shard by shard, each to its end; without, all shards in parallel.

    Raises:
        OSError: as `fetch_shard`; what is committed stays.
    """
    started = False
    with Bar("fetch", sum(len(want.fetched.missing) for want in wants), shown=run.progress) as bar:
        while todo := [(want, place) for want in wants for place in _next(want, bar, run.threads)]:
            calls = [want.call(place) for want, place in todo]
            if not started:
                run.workers.start()
                bar.restart()
                started = True
            for position, entries in run.workers.run(fetch_shard, calls):
                want, place = todo[position]
                for entry in entries:
                    want.put(place, entry)
                bar.count(_sums(entries))


def _next(want: Want, bar: Bar, threads: int) -> list[int]:
    """Places of the shards to go on with, once what is committed of them is taken."""
    if not want.limits:
        missing = want.fetched.missing
        with ThreadPoolExecutor(max_workers=threads) as pool:
            found = list(pool.map(want.look, missing))
        for _ in filter(None, found):
            bar.count({}, reused=True)
        return [place for place, here in zip(missing, found) if not here]
    for place in want.fetched.missing:
        if want.full:
            break
        if not want.look(place):
            return [place]
        bar.count({}, reused=True)
    return []
