"""What happened to every document: counts per source and step, and the logs of what was left out."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.clean import CONTAMINATION, DROPPED, QUARANTINE, read_documents
from data_pipeline.commit import unit_folder
from data_pipeline.config import CORPUS
from data_pipeline.pipeline import Copies, Feed, taken
from data_pipeline.run import Run
from data_pipeline.tokenise import LABEL, SIZE, TOKENS, TokenStage, kept, read_records
from trellis_dist.files import Piece, atomic_write, sha256_file

__all__ = ["DUPLICATES", "LOGS", "Account", "account_for"]

DUPLICATES = "duplicates.jsonl"
LOGS = (QUARANTINE, CONTAMINATION, DROPPED, DUPLICATES)
# Pairs of near duplicates listed, the first in corpus order.
LISTED = 1000
# Steps after the filters, in order.
LATER = ("kept", "exact duplicates", "near duplicates", "evaluation text", "left")
Sums = dict[str, dict[str, int]]


@dataclass
class Account:
    """The books of a data set.

    Attributes:
        labels: documents, tokens and bytes taken, per label of the corpus' documents.
        stages: per source, per step in order: documents and bytes that are left after it ("read",
            "normalised", "kept") or that it dropped (all others).
        quarantined: records that are no documents.
        logs: file name -> sha256 of each log in the data set's folder.
    """

    labels: Sums = field(default_factory=dict)
    stages: dict[str, Sums] = field(default_factory=dict)
    quarantined: int = 0
    logs: dict[str, str] = field(default_factory=dict)


def account_for(run: Run, feeds: Sequence[Feed], copies: Copies, stage: TokenStage) -> Account:
    """Count, and write the logs into the data set's folder."""
    account = Account()
    for feed in feeds:
        steps: Sums = {}
        for entry in feed.cleaned.leading():
            account.quarantined += entry["quarantined"]
            for counts in entry["counts"].values():
                for step, (documents, size) in counts.items():
                    _add(steps, step, documents=documents, bytes=size)
        _count_dropped(steps, feed, copies, run.work)
        account.stages[feed.name] = _ordered(steps)
        _count_labels(account.labels, feed, copies, stage, run.work)
    for name in (QUARANTINE, CONTAMINATION, DROPPED):
        atomic_write(run.directory / name, _joined(feeds, name, run.work))
    atomic_write(run.directory / DUPLICATES, _listed(feeds, copies))
    account.logs = {name: sha256_file(run.directory / name) for name in LOGS}
    return account


def _add(sums: Sums, key: str, **values: int) -> None:
    own = sums.setdefault(key, dict.fromkeys(values, 0))
    for name, value in values.items():
        own[name] += value


def _ordered(steps: Sums) -> Sums:
    """ "read", "normalised", the filters by name, then what follows them."""
    first = ["read", "normalised", *sorted(name for name in steps if name.startswith("filter: ")), *LATER]
    return {name: steps[name] for name in first if name in steps}


def _count_dropped(steps: Sums, feed: Feed, copies: Copies, work: Path) -> None:
    for index, key in enumerate(feed.open_keys):
        documents = read_documents(unit_folder(work, "clean", key))
        exact, near = copies.of(feed.first + index)
        dropped = np.concatenate([exact, near])
        clean = kept(documents, dropped)
        dirty = documents["dirty"] != 0
        dirty[dropped] = False
        for step, chosen in zip(
            LATER[1:], (documents[exact], documents[near], documents[dirty], documents[clean])
        ):
            _add(steps, step, documents=len(chosen), bytes=int(chosen["bytes"].sum()))


def _count_labels(labels: Sums, feed: Feed, copies: Copies, stage: TokenStage, work: Path) -> None:
    for number, unit in enumerate(taken(feed, copies, stage, work)):
        records = read_records(unit.folder)[: unit.documents]
        for index, label in enumerate(feed.cleaned.entries[number]["labels"]):
            chosen = records[records[:, LABEL] == index]
            if len(chosen):
                name = label if feed.name == CORPUS else f"{feed.name}/{label}"
                sums = {"tokens": int(chosen[:, TOKENS].sum()), "bytes": int(chosen[:, SIZE].sum())}
                _add(labels, name, documents=len(chosen), **sums)


def _joined(feeds: Sequence[Feed], name: str, work: Path) -> Iterator[Piece]:
    """The units' logs end to end, each record with its source and the number of its unit."""
    unit = 0
    for feed in feeds:
        for key in feed.open_keys:
            for line in (unit_folder(work, "clean", key) / name).read_bytes().splitlines():
                record = {"corpus": feed.name, "unit": unit} | json.loads(line)
                yield json.dumps(record, sort_keys=True).encode() + b"\n"
            unit += 1


def _listed(feeds: Sequence[Feed], copies: Copies) -> Iterator[Piece]:
    """The first pairs: where the one dropped and the earlier one lie, and their similarity."""
    firsts = [feed.first for feed in feeds]

    def place(document: int) -> dict[str, Any]:
        number = document >> 32
        feed = feeds[bisect_right(firsts, number) - 1]
        unit = feed.units[number - feed.first]
        where = {"corpus": feed.name, "input": unit.name, "unit": copies.keys[number]}
        return where | {"document": document & 0xFFFFFFFF}

    for kind, pairs in (("exact", copies.exact), ("near", copies.near)):
        for pair in pairs[:LISTED]:
            record: dict[str, Any] = {
                "dropped": place(int(pair["dropped"])),
                "original": place(int(pair["kept"])),
            }
            record |= {"kind": kind, "similarity": round(float(pair["similarity"]), 4)}
            yield json.dumps(record, sort_keys=True).encode() + b"\n"
