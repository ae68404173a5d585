"""The stages of `prepare`, in order; each re-uses what is committed.

    plan -> fetch -> clean -> duplicates -> hold out -> tokenizer -> tokens -> shards -> row index -> report

A source with a budget opens as many units as it needs: the stages before "shards" are repeated with more
units until the budget is filled or the source is at its end. How many that takes depends on the text alone:
of a streamed source more may have been fetched than is opened, which is nothing but a cache.

A document is a copy of an earlier one that is in the data set, not of one that was merely opened: where the
budget of a source ends, its copies in later sources begin to count. So the stages are repeated until no
budget ends elsewhere than the search for copies supposed, first the first source's, then the second's, ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import tokenise
from data_pipeline.clean import QUARANTINE, CleanStage, clean_unit, read_documents
from data_pipeline.commit import read_unit, unit_folder
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dedup import (
    Partition,
    dropped_positions,
    pairs_of,
    partitions,
    read_pairs,
    run_partition,
    write_copies,
)
from data_pipeline.fetch import Fetched, Want, fetch
from data_pipeline.holdout import SPLITS, Holdout, choose_holdout
from data_pipeline.merge import Taken
from data_pipeline.progress import Bar
from data_pipeline.run import Run
from data_pipeline.sources import Unit
from data_pipeline.stages import Lead, Line, ahead, run_lines
from data_pipeline.streams import plan_source
from data_pipeline.tokenise import SPLIT, TOKENS, TokenStage, read_records, token_unit
from trellis_dist.files import digest, write_json

__all__ = [
    "Copies",
    "Feed",
    "clean",
    "find_copies",
    "hold_out",
    "note_reach",
    "open_more",
    "plan_feeds",
    "taken",
    "tokens",
]

# Text opened for a budget of one token, in bytes: about what a token of 32,000 pieces holds. Too little opens
# more in a second round, too much cleans text for nothing.
BYTES_PER_TOKEN = 4.5
# Documents that thresholds are checked on, and the fewest where a budget is smaller than one document.
ENOUGH_HASHES, LEAST_HASHES = 200_000, 3
# Fetched for each byte that is missing, so that one round does; and at most for each that is there, however
# much of it was dropped.
FETCH_MORE, FETCH_MOST = 1.2, 4.0


@dataclass
class Feed:
    """One source of the recipe on its way through the stages.

    Attributes:
        name, source: as in the recipe.
        units: all there are, in order; up to the first stream that is not all fetched.
        stage: what "clean" does.
        cleaned: the clean units; its leading ones are open.
        keys: number -> key of the clean units.
        tokenised: the token units of the leading clean units.
        first: number of its first open unit among those of all sources.
        reach: documents of each open unit that the budget reached in the last round; None: all.
        fetched: what is here of its streams.
    """

    name: str
    source: SourceConfig
    units: list[Unit]
    stage: CleanStage
    cleaned: Lead
    keys: dict[int, str] = field(default_factory=dict)
    tokenised: Lead = field(default_factory=lambda: Lead({}, _token_sums))
    first: int = 0
    reach: list[int] | None = None
    fetched: Fetched | None = None

    @property
    def unfetched(self) -> bool:
        """Whether the source has parts that are not among the units."""
        return self.fetched is not None and bool(self.fetched.missing)

    @property
    def open_keys(self) -> list[str]:
        """Keys of the open clean units."""
        return [self.keys[index] for index in range(self.cleaned.count)]

    @property
    def budget(self) -> dict[str, float]:
        """What the source's tokens are limited to."""
        limits = {"documents": self.source.max_documents, "train_tokens": self.source.max_tokens}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Copies:
    """Pairs of copies (dedup.PAIR), exact and near.

    Units go by number, in corpus order: two of them may have one key, where sources hold the same file.

    Attributes:
        exact, near: the pairs.
        keys: of the open clean units of all sources, by number.
    """

    exact: np.ndarray
    near: np.ndarray
    keys: Sequence[str]

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions dropped in a clean unit: as exact copies, as near ones."""
        return dropped_positions(self.exact, number), dropped_positions(self.near, number)

    def elsewhere(self, first: int, number: int) -> np.ndarray:
        """Positions dropped in a clean unit as copies of what is before unit `first`, its source's."""
        found = [pairs_of(pairs, number) for pairs in (self.exact, self.near)]
        chosen = [pairs["dropped"][pairs["kept"] < (first << 32)] & 0xFFFFFFFF for pairs in found]
        return np.concatenate(chosen).astype("<u4")

    def dropped(self, number: int) -> np.ndarray:
        """All positions dropped in a clean unit, sorted."""
        return np.sort(np.concatenate(self.of(number)))


def _clean_sums(entry: dict[str, Any]) -> dict[str, float]:
    return {"documents": entry["documents"], "bytes": entry["bytes"]}


def _token_sums(entry: dict[str, Any]) -> dict[str, float]:
    return {"documents": sum(entry["documents"]), "train_tokens": entry["tokens"][SPLITS.index("train")]}


def plan_feeds(config: DataConfig, *, ngrams: Path | None, ngrams_sha256: str | None) -> list[Feed]:
    """The sources with their units. Raises ValueError: one is missing or holds nothing that can be read."""
    feeds = []
    for name, source in config.sources.items():
        path = None if ngrams is None else str(ngrams)
        stage = CleanStage(source, config.normalize, config.filters, config.dedup, path, ngrams_sha256)
        limits: dict[str, float] = {}
        if source.max_tokens is not None:
            limits["bytes"] = source.max_tokens * BYTES_PER_TOKEN
        if source.max_documents is not None:
            limits["documents"] = source.max_documents
        feed = Feed(name, source, [], stage, Lead(limits, _clean_sums))
        feed.fetched = Fetched(plan_source(source, config.unit_bytes))
        feed.units = feed.fetched.units(Path())  # those before the first stream; no part is known yet
        feeds.append(feed)
    return feeds


def clean(feeds: Sequence[Feed], run: Run) -> None:
    """Clean as many units of each source as it opens, and fetch them where it is streamed."""
    while True:
        hungry = [feed for feed in feeds if _hungry(feed)]
        if wants := [_wanted(feed, feed.fetched, run.work) for feed in hungry if feed.fetched]:
            fetch(wants, run)
        for feed in feeds:
            if feed.fetched:
                feed.units = feed.fetched.units(run.work)
        _clean_units(
            [feed for feed in feeds if not feed.cleaned.full and feed.cleaned.count < len(feed.units)], run
        )
        if not any(map(_hungry, feeds)):
            return


def _hungry(feed: Feed) -> bool:
    """Whether all that is fetched is cleaned, and not enough."""
    return feed.unfetched and not feed.cleaned.full and feed.cleaned.count == len(feed.units)


def _wanted(feed: Feed, fetched: Fetched, work: Path) -> Want:
    """What is missing in the lead, and more as a share of the text is dropped."""
    limits, before = {}, fetched.sums(feed.cleaned.entries)
    for name, limit in feed.cleaned.limits.items():
        kept = feed.cleaned.sums.get(name, 0)
        limits[name] = (limit - kept) * FETCH_MORE
        if before[name]:
            most = FETCH_MOST * before[name]
            limits[name] = min(most, limits[name] * before[name] / kept) if kept else most
    return Want(fetched, limits, work)


def _clean_units(feeds: Sequence[Feed], run: Run) -> None:
    if not feeds:
        return

    def line(feed: Feed) -> Line:
        def known(index: int) -> tuple[int, tuple[Any, ...], dict[str, Any] | None]:
            unit = feed.units[index].sealed()
            feed.keys[index] = feed.stage.key(unit)
            entry = feed.cleaned.entries.get(index)
            entry = entry or read_unit(unit_folder(run.work, "clean", feed.keys[index]))
            return index, (unit, feed.stage, feed.keys[index], str(run.work)), entry

        todo = (index for index in range(len(feed.units)) if index not in feed.cleaned.entries)
        return Line(feed.cleaned, ahead(known, todo, threads=run.threads))

    bar = Bar("clean", sum(len(feed.units) for feed in feeds), shown=run.progress)
    run_lines(run.workers, clean_unit, [line(feed) for feed in feeds], bar)


def find_copies(feeds: Sequence[Feed], config: DataConfig, run: Run) -> Copies:
    """Which documents of the open units are copies of earlier ones."""
    keys: list[str] = []
    searched: list[tuple[str, int, int]] = []
    for source, feed in enumerate(feeds):
        feed.first = len(keys)
        keys += feed.open_keys
        reach = feed.reach or [entry["documents"] for entry in feed.cleaned.leading()]
        searched += [(key, source, count) for key, count in zip(feed.open_keys, reach, strict=True)]
    documents = sum(entry["documents"] for feed in feeds for entry in feed.cleaned.leading())
    plan = run.work / "plans" / f"{digest(searched)}.json"
    write_json(plan, searched)
    dedup, near = config.dedup, read_pairs([])
    exact = near
    if dedup.exact or dedup.similarity is not None:
        count = partitions(documents)
        parts = [Partition("exact", str(plan), i, count) for i in range(count)]
        exact = read_pairs(_run_partitions(parts, run))
    if dedup.similarity is not None:
        count = partitions(documents * dedup.bands)
        own = (write_copies(exact, run.work / "plans"), dedup.permutations, dedup.bands, dedup.similarity)
        parts = [Partition("near", str(plan), i, count, *own) for i in range(count)]
        near = read_pairs(_run_partitions(parts, run))
    return Copies(exact, near, keys)


def _run_partitions(parts: Sequence[Partition], run: Run) -> list[Path]:
    folders = [unit_folder(run.work, part.kind, part.key) for part in parts]
    found = ahead(read_unit, iter(folders), threads=run.threads)
    calls = ((i, (part, str(run.work)), entry) for i, (part, entry) in enumerate(zip(parts, found)))
    bar = Bar(f"{parts[0].kind} duplicates", len(parts), shown=run.progress)
    run_lines(run.workers, run_partition, [Line(Lead({}, lambda entry: {}), calls)], bar)
    return folders


def hold_out(feeds: Sequence[Feed], copies: Copies, config: DataConfig, run: Run) -> Holdout:
    """Thresholds over the documents that are kept. Raises ValueError: the corpus is too small."""
    if not any(entry["documents"] for feed in feeds for entry in feed.cleaned.leading()):
        raise ValueError(f"data.source: no document of the corpus could be read{_why_none(feeds, run)}")
    found = [_first_hashes(feed, copies, run.work) for feed in feeds]
    hashes = np.concatenate([hashes[:sure] for hashes, sure in found])
    # Budgets of one document: likely the first ones.
    if len(np.unique(hashes)) < 2 + (config.test_fraction > 0):
        hashes = np.concatenate([hashes for hashes, _ in found])
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    return choose_holdout(hashes, **fractions)


def _first_hashes(feed: Feed, copies: Copies, work: Path) -> tuple[np.ndarray, int]:
    """Hashes of the first documents that are kept, and how many of them the budget takes as far as is known.

    One of those is held out; over many the shares alone decide. A document has at most as many tokens as
    bytes, and BOS and EOS; and a copy of another source's document may be taken yet, once that source's
    budget has ended (`note_reach`), so it takes its room as well.
    """
    found, sure = [np.empty(0, np.uint64)], 0
    used = np.zeros(2, np.int64)  # documents and tokens at most, so far
    limits = [feed.source.max_documents or ENOUGH_HASHES, feed.source.max_tokens or np.iinfo(np.int64).max]
    for index, key in enumerate(feed.open_keys):
        documents = read_documents(unit_folder(work, "clean", key))
        kept = tokenise.kept(documents, copies.dropped(feed.first + index))
        counted = kept.copy()
        counted[copies.elsewhere(feed.first, feed.first + index)] = True
        sizes = np.stack([counted, counted * (documents["bytes"].astype(np.int64) + 2)])
        ends = used[:, None] + np.cumsum(sizes, axis=1)
        fits = (ends <= np.array(limits)[:, None]).all(axis=0)
        used = ends[:, -1] if len(documents) else used
        sure += int((kept & fits).sum())
        found.append(documents["hash"][kept])
        if (sure >= ENOUGH_HASHES or (used >= limits).any()) and sum(map(len, found)) >= LEAST_HASHES:
            break
    hashes = np.concatenate(found)
    return hashes[: max(sure, min(LEAST_HASHES, limits[0]))], sure


def _why_none(feeds: Sequence[Feed], run: Run) -> str:
    """The first record left out, or the filter that dropped most."""
    steps: dict[str, int] = {}
    for feed in feeds:
        for key, entry in zip(feed.open_keys, feed.cleaned.leading()):
            if entry["quarantined"]:
                first = (unit_folder(run.work, "clean", key) / QUARANTINE).read_text().splitlines()[0]
                return " ({file} at {offset}: {reason})".format(**json.loads(first))
            for counts in entry["counts"].values():
                for step, (documents, _) in counts.items():
                    steps[step] = steps.get(step, 0) + documents
    dropped = {step: count for step, count in steps.items() if step.startswith("filter: ")}
    most = max(dropped, key=dropped.__getitem__, default=None)
    return f" ({most} dropped {dropped[most]} of {steps['read']}: loosen data.filters)" if most else ""


def tokens(feeds: Sequence[Feed], copies: Copies, stage: TokenStage, run: Run) -> None:
    """Tokenise the open units of each source, as far as its budget reaches."""

    def line(feed: Feed) -> Line:
        def known(index: int) -> tuple[int, tuple[Any, ...], dict[str, Any] | None]:
            key = feed.keys[index]
            dropped = copies.dropped(feed.first + index)
            own = stage.key(key, dropped)
            entry = read_unit(unit_folder(run.work, "tokens", own))
            return index, (key, dropped, stage, own, str(run.work)), entry

        feed.tokenised = Lead(feed.budget, _token_sums)
        return Line(feed.tokenised, ahead(known, iter(range(feed.cleaned.count)), threads=run.threads))

    bar = Bar("tokenise", sum(feed.cleaned.count for feed in feeds), shown=run.progress)
    run_lines(run.workers, token_unit, [line(feed) for feed in feeds], bar)


def note_reach(feeds: Sequence[Feed], copies: Copies, stage: TokenStage, work: Path) -> bool:
    """Note how far each budget reaches; True where the search for copies supposed something else.

    The last source's is of no account: nothing after it could be a copy of what it does not take.
    """
    before = [feed.reach for feed in feeds]
    for feed in feeds[:-1]:
        found = _reach(feed, copies, stage, work) if feed.tokenised.full else None
        feed.reach = None if found == [entry["documents"] for entry in feed.cleaned.leading()] else found
    return before != [feed.reach for feed in feeds]


def _reach(feed: Feed, copies: Copies, stage: TokenStage, work: Path) -> list[int]:
    counts = [entry["documents"] for entry in feed.cleaned.leading()]
    parts = list(taken(feed, copies, stage, work))
    last = len(parts) - 1
    documents = read_documents(unit_folder(work, "clean", feed.keys[last]))
    places = np.flatnonzero(tokenise.kept(documents, copies.dropped(feed.first + last)))
    end = int(places[parts[last].documents - 1]) + 1 if parts[last].documents else 0
    return [*counts[:last], end, *[0] * (len(counts) - last - 1)]


def open_more(feeds: Sequence[Feed]) -> bool:
    """Open more units where a budget is not filled and there are more; False when there is nothing to do."""
    short = [
        feed
        for feed in feeds
        if feed.budget
        and not feed.tokenised.full
        and (feed.unfetched or feed.cleaned.count < len(feed.units))
    ]
    for feed in short:
        got = max(feed.tokenised.sums.get(name, 0) / limit for name, limit in feed.budget.items())
        factor = min(4.0, 1.1 / got) if got else 4.0
        opened = feed.cleaned.sums
        feed.cleaned.raise_limits({name: opened[name] * factor + 1 for name in feed.cleaned.limits})
    return bool(short)


def taken(feed: Feed, copies: Copies, stage: TokenStage, work: Path) -> Iterator[Taken]:
    """The documents that the budget takes, unit by unit: up to the one that fills it."""
    limit, room = feed.source.max_documents, feed.source.max_tokens
    for index in range(feed.tokenised.count):
        key = feed.keys[index]
        folder = unit_folder(work, "tokens", stage.key(key, copies.dropped(feed.first + index)))
        records = read_records(folder)[:limit]
        train = np.where(records[:, SPLIT] == SPLITS.index("train"), records[:, TOKENS], 0)
        if room is not None and train.sum() >= room:
            records = records[: int(np.searchsorted(np.cumsum(train), room)) + 1]
        yield Taken(folder, len(records))
        limit = None if limit is None else limit - len(records)
        room = None if room is None else room - int(train[: len(records)].sum())
        if limit == 0 or (room is not None and room <= 0):
            return
