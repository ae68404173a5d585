"""The report's sections on what was left out: counts, reasons, and the text itself to judge them by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.account import DUPLICATES
from data_pipeline.clean import CONTAMINATION, DROPPED, QUARANTINE, read_documents, read_texts
from data_pipeline.commit import unit_folder
from data_pipeline.config import FilterConfig
from data_pipeline.filters import Filters
from data_pipeline.manifest import Manifest
from trellis_dist.report import Report

__all__ = ["COPIES", "beginning", "count_dropped", "write_dropped"]

# Rows of a log shown; documents shown per filter, and lines and characters of each.
LOG_ROWS, EXAMPLES, LINES, CHARACTERS = 50, 3, 8, 300
# Near duplicates shown; a pair that lies deeper in its unit is not read for it.
PAIRS, PAIR_DEPTH = 5, 256 * 2**20
# Fewer similarities than this are no distribution.
HISTOGRAM_PAIRS = 20
COPIES = ("exact duplicates", "near duplicates")


def write_dropped(page: Report, directory: Path, manifest: Manifest, filters: FilterConfig) -> None:
    """Add what filters, deduplication and decontamination dropped, and what was quarantined.

    Args:
        page: the report.
        directory: the data set, with its logs and work folder.
        manifest: its manifest.
        filters: the filters it was prepared with.
    """
    _filtered(page, manifest, filters, directory / DROPPED)
    _copies(page, manifest, directory)
    _contaminated(page, manifest, directory / CONTAMINATION)
    _quarantined(page, manifest.quarantined, directory / QUARANTINE)


def count_dropped(manifest: Manifest, *steps: str) -> int:
    """Documents that these steps dropped, over all sources; for "read", those that were read."""
    return sum(sums.get(step, {}).get("documents", 0) for sums in manifest.stages.values() for step in steps)


def _filtered(page: Report, manifest: Manifest, filters: FilterConfig, path: Path) -> None:
    page.section("Filters")
    rules = Filters(filters).rules
    if not rules:
        page.text("No filter has a threshold: every document with text in it was kept.")
        return
    page.text("Tried in this order; a document counts for the first rule that drops it.")
    read = max(1, count_dropped(manifest, "read"))
    counts = {rule: count_dropped(manifest, f"filter: {rule}") for rule in rules}
    rows = [[rule, _threshold(rule, filters), f"{n:,}", f"{n / read:.2%}"] for rule, n in counts.items()]
    page.table(["rule", "keeps", "documents dropped", "share of those read"], rows)
    for rule, found in _first_per_rule(path, [rule for rule in rules if counts[rule]]).items():
        page.subsection(f"Dropped by {rule}")
        page.beside({_place(record): beginning(record["text"]) for record in found})


def _threshold(rule: str, filters: FilterConfig) -> str:
    """What the rule asks for, in words."""
    if rule == "language":
        return f"{', '.join(filters.languages)} with probability {filters.language_confidence:g} or more"
    for prefix, shares, smallest in (
        ("top_", filters.max_top_ngrams, 2),
        ("duplicate_", filters.max_duplicate_ngrams, 5),
    ):
        if rule.startswith(prefix) and rule.endswith("_grams"):
            return f"{shares[int(rule.split('_')[1]) - smallest]:g} or less"
    for key, words in ((rule, ""), (f"min_{rule}", "or more"), (f"max_{rule}", "or less")):
        if (value := getattr(filters, key, None)) is not None:
            return f"{value:,} {words or ('or more' if key.startswith('min_') else 'or less')}"
    return ""


def _first_per_rule(path: Path, rules: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {rule: [] for rule in rules}
    missing = set(rules)
    for record in _records(path):
        if (rule := record["rule"]) in missing:
            found[rule].append(record)
            if len(found[rule]) == EXAMPLES:
                missing.remove(rule)
        if not missing:
            break
    return {rule: records for rule, records in found.items() if records}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def beginning(text: str, *, lines: int = LINES, characters: int = CHARACTERS) -> str:
    """A few lines: more would push the next example off the screen."""
    return "\n".join(text[:characters].splitlines()[:lines])


def _place(record: Mapping[str, Any]) -> str:
    size = f", {record['bytes']:,} bytes" if "bytes" in record else ""
    return f"{record['file']} at {record['offset']:,}{size}"


def _copies(page: Report, manifest: Manifest, directory: Path) -> None:
    page.section("Duplicates")
    exact, near = (count_dropped(manifest, step) for step in COPIES)
    page.text(
        f"{exact:,} documents were equal to an earlier one, {near:,} more were similar to an earlier one. "
        "The earliest in the corpus is kept."
    )
    pairs = [record for record in _records(directory / DUPLICATES) if record["kind"] == "near"]
    if len(pairs) >= HISTOGRAM_PAIRS:
        _similarities(page, [pair["similarity"] for pair in pairs])
    pairs.sort(key=lambda pair: pair["similarity"])
    chosen = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs)))]
    for pair in chosen:
        kept, dropped = (_text_of(directory, pair[which]) for which in ("original", "dropped"))
        if kept is None or dropped is None:
            continue
        page.subsection(f"Similarity {pair['similarity']:.2f}")
        start = max(0, _first_difference(kept, dropped) - CHARACTERS // 3)
        where = f", from character {start:,}" if start else ""
        texts = {f"kept{where}": kept, f"dropped{where}": dropped}
        page.beside({title: beginning(text[start:]) for title, text in texts.items()})


def _similarities(page: Report, values: Sequence[float]) -> None:
    counts, edges = np.histogram(values, np.linspace(min(values), 1.0, 11) if min(values) < 1 else 10)
    bars = [
        (f"{low:.3f} to {high:.3f}", float(n), f"{n:,}") for n, (low, high) in zip(counts, pairwise(edges))
    ]
    page.bar_chart(f"Similarity of the first {len(values):,} near duplicates to what was kept", bars)


def _text_of(directory: Path, place: dict[str, Any]) -> str | None:
    """Text of a document that the log names; None where it lies too deep in its unit."""
    folder, position = unit_folder(directory / "work", "clean", place["unit"]), place["document"]
    sizes = read_documents(folder)["bytes"]
    if sizes[:position].sum() > PAIR_DEPTH:
        return None
    return next(read_texts(folder, np.arange(len(sizes)) == position))


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _contaminated(page: Report, manifest: Manifest, path: Path) -> None:
    page.section("Evaluation text")
    count = count_dropped(manifest, "evaluation text")
    rows = [
        [_place(record), record["ngram"], record["evaluation"]] for record in islice(_records(path), LOG_ROWS)
    ]
    if not rows:
        page.text("No document shares an n-gram with the evaluation sets, or none are named in the recipe.")
        return
    page.text(f"{count:,} documents were dropped, copies not counted; {path.name} lists every hit.")
    page.table(["document", "words in common", "evaluation set"], rows)


def _quarantined(page: Report, count: int, path: Path) -> None:
    page.section("Quarantined")
    if not count:
        page.text("Nothing was left out.")
        return
    page.text(f"{count:,} records were left out; {path.name} lists all of them.")
    rows = [
        [record["file"], f"{record['offset']:,}", record["reason"]]
        for record in islice(_records(path), LOG_ROWS)
    ]
    page.table(["file", "offset", "reason"], rows)
