"""Deduplication: which documents are copies of an earlier one, without ever holding the corpus in memory.

Each clean unit left its fingerprints sorted (clean.py): hashes of whole texts, and keys of MinHash bands. A
partition is one range of the key space; its task reads that range from every unit, sorts, and finds equal
keys. So memory is bounded by `PARTITION_RECORDS`, whatever the size of the corpus, and partitions are work
units like any other: pure, committed, the same for any number of workers.

    id of a document = unit << 32 | position, units in corpus order, so a smaller id came earlier

A document is dropped if an *earlier* one is equal (exact), or agrees with it in a band and has an estimated
Jaccard similarity of at least ``data.dedup.similarity`` (near; Broder 1997, "On the resemblance and
containment of documents"; bands: Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4).
Therefore more text at the end of the corpus never changes what is kept before it. Where the budget of a
source ends before its documents do, those beyond are the originals of nothing but each other: the data set
will not hold them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.clean import BAND, EXACT
from data_pipeline.commit import commit_unit, unit_folder
from data_pipeline.signatures import similarity
from trellis_dist.files import atomic_write, digest, read_json

__all__ = [
    "PAIR",
    "Partition",
    "dropped_positions",
    "pairs_of",
    "partitions",
    "read_pairs",
    "run_partition",
    "write_copies",
]

# Records of one partition: about 100 bytes of memory each while they are sorted.
PARTITION_RECORDS = 2**20
# A dropped document, the earlier one it is a copy of, and their similarity.
PAIR = np.dtype([("dropped", "<i8"), ("kept", "<i8"), ("similarity", "<f4")])
# Signatures compared at a time.
COMPARED = 1 << 14
# Files of pairs in memory at a time.
TOGETHER = 16
# Documents of one bucket that others are compared with; in a bucket of more, the rest goes uncompared.
HEADS = 64
VERSION = 2


@dataclass(frozen=True)
class Partition:
    """One range of the keys, of one kind.

    Attributes:
        kind: "exact" or "near".
        plan: file with the clean units in corpus order, the source of each by number, and how many of its
            documents the budget reaches (JSON), the same for all partitions.
        index, count: the range is [index, index + 1) * 2**64 / count.
        copies: file with the ids of the exact copies, sorted (`write_copies`), which take no part in "near".
        permutations, bands, threshold: of "near" (`DedupConfig`).
    """

    kind: str
    plan: str
    index: int
    count: int
    copies: str = ""
    permutations: int = 0
    bands: int = 0
    threshold: float = 0.0

    @property
    def key(self) -> str:
        """Content address: the names of both files are hashes of their content."""
        own = [self.kind, Path(self.plan).stem, self.index, self.count, Path(self.copies).stem]
        return digest([VERSION, *own, self.permutations, self.bands, self.threshold])


class Searched(NamedTuple):
    """A clean unit, the number of its source, and how many of its documents the source's budget reaches."""

    folder: Path
    source: int
    reach: int


def _sources(units: Sequence[Searched], ids: np.ndarray) -> np.ndarray:
    """int64 [n]: number of the source of each document."""
    found: np.ndarray = np.array([unit.source for unit in units], np.int64)[ids >> 32]
    return found


def _reached(units: Sequence[Searched], ids: np.ndarray) -> np.ndarray:
    """bool [n]: whether each document is within the reach of its source's budget."""
    found: np.ndarray = (ids & 0xFFFFFFFF) < np.array([unit.reach for unit in units], np.int64)[ids >> 32]
    return found


def partitions(records: int) -> int:
    """How many partitions hold `records` keys."""
    return max(1, -(-records // PARTITION_RECORDS))


def run_partition(partition: Partition, work: str) -> dict[str, Any]:
    """Find the copies among the documents of one range, and commit them as ``pairs``: PAIR [n].

    Raises:
        OSError: the disk is full, ...; nothing is committed then.
    """

    def write(folder: Path) -> dict[str, Any]:
        plan = read_json(Path(partition.plan))
        units = [Searched(unit_folder(work, "clean", key), source, reach) for key, source, reach in plan]
        pairs = _exact(partition, units) if partition.kind == "exact" else _near(partition, units)
        pairs.tofile(folder / "pairs")
        return {"pairs": len(pairs)}

    return commit_unit(work, partition.kind, partition.key, write)


def read_pairs(folders: Sequence[Path]) -> np.ndarray:
    """PAIR [n] of several partitions, one per dropped document (the earliest it is a copy of), sorted."""
    found = np.empty(0, PAIR)
    # A near copy is found in every band that agrees: never all of them at once in memory.
    for start in range(0, len(folders), TOGETHER):
        more = [np.fromfile(folder / "pairs", PAIR) for folder in folders[start : start + TOGETHER]]
        found = _earliest(np.concatenate([found, *more]))
    return found


def write_copies(pairs: np.ndarray, plans: Path) -> str:
    """Write the ids of dropped documents, sorted, under the hash of them; the path."""
    ids = pairs["dropped"].astype("<i8").tobytes()
    path = plans / f"{hashlib.sha256(ids).hexdigest()}.ids"
    atomic_write(path, ids)
    return str(path)


def _earliest(pairs: np.ndarray) -> np.ndarray:
    pairs = pairs[np.lexsort((pairs["kept"], pairs["dropped"]))]
    _, first = np.unique(pairs["dropped"], return_index=True)
    chosen: np.ndarray = pairs[first]
    return chosen


def dropped_positions(pairs: np.ndarray, unit: int) -> np.ndarray:
    """uint32: positions in the unit of that number whose documents are dropped; `pairs` sorted."""
    return (pairs_of(pairs, unit)["dropped"] & 0xFFFFFFFF).astype("<u4")


def pairs_of(pairs: np.ndarray, unit: int) -> np.ndarray:
    """PAIR of the documents dropped in the unit of that number; `pairs` sorted."""
    first, last = np.searchsorted(pairs["dropped"], [unit << 32, (unit + 1) << 32])
    found: np.ndarray = pairs[first:last]
    return found


def _exact(partition: Partition, units: Sequence[Searched]) -> np.ndarray:
    records, ids = _gather(partition, units, "exact", EXACT, "hash")
    order = np.lexsort((ids, records["hash2"], records["hash"]))
    records, ids = records[order], ids[order]
    other = (records["hash"][1:] != records["hash"][:-1]) | (records["hash2"][1:] != records["hash2"][:-1])
    sources = _sources(units, ids)
    # The first that is reached, whatever its source, or the first of the same source: which comes earlier.
    reached = _firsts(_groups(other), ids, _reached(units, ids))
    own = _firsts(_groups(other | (sources[1:] != sources[:-1])), ids, np.ones(len(ids), bool))
    kept = np.minimum(reached, own)
    dropped = kept < ids
    return _pairs(ids[dropped], kept[dropped], np.ones(int(dropped.sum())))


def _groups(begins: np.ndarray) -> np.ndarray:
    """int64 [n]: group number of each of n sorted records; `begins` [n - 1]: the next one is of another."""
    found: np.ndarray = np.concatenate([[0], np.cumsum(begins)]).astype(np.int64)
    return found


def _firsts(groups: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64 [n]: the least value of those `chosen` in the group of each; without one, more than any."""
    groups = groups[: len(values)]  # of no record `_groups` makes one group: it cannot tell none from one
    least = np.full(int(groups.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, groups[chosen], values[chosen])
    found: np.ndarray = least[groups]
    return found


def _near(partition: Partition, units: Sequence[Searched]) -> np.ndarray:
    records, ids = _gather(partition, units, "bands", BAND, "key")
    alive = ~_listed(ids, Path(partition.copies))
    keys, ids = records["key"][alive], ids[alive]
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    found, left = _compared(partition, units, ids, _groups(keys[1:] != keys[:-1]), _reached(units, ids))
    # What a budget does not reach may be copies of each other, source by source.
    rest = left[~_reached(units, ids[left])]
    keys, ids = keys[rest], ids[rest]
    sources = _sources(units, ids)
    groups = _groups((keys[1:] != keys[:-1]) | (sources[1:] != sources[:-1]))
    more, _ = _compared(partition, units, ids, groups, np.ones(len(ids), bool))
    return _earliest(np.concatenate([found, more]))


def _compared(
    partition: Partition, units: Sequence[Searched], ids: np.ndarray, groups: np.ndarray, leads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the documents of each group with those before them that lead.

    Args:
        ids: int64 [n], rising inside each group.
        groups: int64 [n], rising: a bucket of a band, or a part of one.
        leads: bool [n], which may be the original of others.

    Returns:
        PAIR of those similar enough to one, and the rows of those that are not and led nothing.
    """
    found, rows = [np.empty(0, PAIR)], np.arange(len(ids))
    for _ in range(HEADS):
        heads = _firsts(groups[rows], rows, leads[rows])
        after = heads < rows
        if not after.any():
            break
        later, before = ids[rows[after]], ids[heads[after]]
        near = _similarities(units, later, before, partition.permutations)
        hit = near >= partition.threshold
        found.append(_pairs(later[hit], before[hit], near[hit]))
        # What is not similar to the first of its bucket is compared with the first of what is left.
        gone = heads == rows
        gone[np.flatnonzero(after)[hit]] = True
        rows = rows[~gone]
    return np.concatenate(found), rows


def _listed(ids: np.ndarray, path: Path) -> np.ndarray:
    """bool [n]: whether each id is among those in the file, which is searched and not read."""
    if not path.stat().st_size:
        return np.zeros(len(ids), bool)
    stored = np.memmap(path, "<i8", "r")
    found: np.ndarray = stored[np.minimum(np.searchsorted(stored, ids), len(stored) - 1)] == ids
    return found


def _gather(
    partition: Partition, units: Sequence[Searched], name: str, dtype: np.dtype, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """The partition's records of all units, and the ids of their documents."""
    low, high = (-(-(index << 64) // partition.count) for index in (partition.index, partition.index + 1))
    records, ids = [np.empty(0, dtype)], [np.empty(0, np.int64)]
    for number, unit in enumerate(units):
        path = unit.folder / name
        if path.stat().st_size:
            stored = np.memmap(path, dtype, "r")
            # By hand: the column is not aligned, and numpy would copy all of it to search in it.
            column = stored[key]
            start, stop = (bisect_left(range(len(column)), edge, key=column.item) for edge in (low, high))
            records.append(np.array(stored[start:stop]))
            ids.append((np.int64(number) << 32) | records[-1]["position"].astype(np.int64))
    return np.concatenate(records), np.concatenate(ids)


def _pairs(dropped: np.ndarray, kept: np.ndarray, near: np.ndarray) -> np.ndarray:
    pairs = np.empty(len(dropped), PAIR)
    pairs["dropped"], pairs["kept"], pairs["similarity"] = dropped, kept, near
    return pairs


def _similarities(units: Sequence[Searched], a: np.ndarray, b: np.ndarray, permutations: int) -> np.ndarray:
    """Estimated Jaccard similarities of the documents a[i] and b[i], float32 [n]."""
    found = np.empty(len(a), np.float32)
    for start in range(0, len(a), COMPARED):
        part = slice(start, start + COMPARED)
        first, second = (_signatures(units, ids[part], permutations) for ids in (a, b))
        found[part] = similarity(first, second)
    return found


def _signatures(units: Sequence[Searched], ids: np.ndarray, permutations: int) -> np.ndarray:
    """uint32 [n, permutations], read from the units that hold them."""
    found = np.empty((len(ids), permutations), np.uint32)
    order = np.argsort(ids >> 32, kind="stable")
    numbers, first = np.unique(ids[order] >> 32, return_index=True)
    for number, chosen in zip(numbers, np.split(order, first[1:])):
        stored = np.memmap(units[number].folder / "signatures", "<u4", "r").reshape(-1, permutations)
        found[chosen] = stored[ids[chosen] & 0xFFFFFFFF]
    return found
