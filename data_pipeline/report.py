"""The data set's page: what happened to every document, what was dropped and why, and a look at the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.filters import Filters
from data_pipeline.holdout import SPLITS
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.pack import Packing, num_rows, pack
from data_pipeline.report_drops import COPIES, beginning, count_dropped, write_dropped
from data_pipeline.shard import Shard
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import atomic_write
from trellis_dist.report import Report

__all__ = ["write_report"]

SAMPLES, SAMPLE_LINES, SAMPLE_CHARACTERS = 4, 10, 600
PACKINGS: tuple[Packing, ...] = ("concat", "best_fit", "per_document")
# Steps after which documents are counted; the others drop them.
STATES = {"read": "read", "kept": "kept by the filters", "left": "left"}
DROPS = {"normalised": "quarantined: no text once normalised"}
FIRST_SHARDS = "The first shard of each split and source stands for the rest."


@dataclass(frozen=True)
class _Part:
    """The shards of one source in one split."""

    split: str
    source: str
    shards: tuple[ShardInfo, ...]
    alone: bool

    @property
    def name(self) -> str:
        return self.split if self.alone else f"{self.split}, {self.source}"

    def total(self, count: str) -> int:
        """Sum of documents, tokens or bytes."""
        return sum(getattr(shard, count) for shard in self.shards)


def write_report(directory: Path, manifest: Manifest, config: DataConfig) -> Path:
    """Write ``directory``/report.html, one self-contained page; all text of the corpus is escaped.

    Args:
        directory: the data set, its shards, tokenizer, logs and work folder written.
        manifest: its manifest.
        config: its config; the packing figures are for ``config.sequence_length``.
    """
    parts = list(_parts(manifest, config))
    shards = {part: Shard(directory / part.shards[0].name) for part in parts}
    page = Report("Data set", f"{manifest.source['kind']} corpus, fingerprint {manifest.fingerprint[:16]}")
    _facts(page, manifest)
    page.section("What happened to the documents")
    for name in config.sources:
        steps = _ordered(manifest.stages[name], Filters(config.filters).rules)
        _flow(page, name, steps, [part for part in parts if part.source == name])
    _labels(page, manifest)
    write_dropped(page, directory, manifest, config.filters)
    _lengths(page, {part: shard for part, shard in shards.items() if part.split == "train"})
    _packing(page, shards, config)
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    _samples(page, shards, tokenizer)
    _tokenizer(page, manifest, tokenizer)
    _sources(page, manifest, config)
    _seconds(page, manifest)
    path = directory / "report.html"
    atomic_write(path, page.render())
    return path


def _parts(manifest: Manifest, config: DataConfig) -> Iterator[_Part]:
    for split in (split for split in SPLITS if split in manifest.splits):
        for source in config.sources:
            shards = tuple(shard for shard in manifest.splits[split].shards if shard.source == source)
            if shards:
                yield _Part(split, source, shards, len(config.sources) == 1)


def _ordered(steps: Mapping[str, Mapping[str, int]], rules: Sequence[str]) -> dict[str, Mapping[str, int]]:
    """The steps in the order in which they are taken; a manifest that was read from its file has another."""
    order = ["read", "normalised", *(f"filter: {rule}" for rule in rules), "kept", *COPIES]
    return {step: steps[step] for step in [*order, "evaluation text", "left"] if step in steps}


def _facts(page: Report, manifest: Manifest) -> None:
    splits = manifest.splits.values()
    size, tokens = sum(s.bytes for s in splits), sum(s.tokens for s in splits)
    page.facts(
        {
            "documents": f"{sum(s.documents for s in splits):,}",
            "text": f"{size / 1e6:,.2f} MB",
            "tokens": f"{tokens:,}",
            "bytes per token": f"{size / tokens:.3f}",
            "vocabulary": f"{manifest.tokenizer['vocab_size']:,}",
            "quarantined": f"{manifest.quarantined:,}",
            "duplicates dropped": f"{count_dropped(manifest, *COPIES):,}",
            "contaminated dropped": f"{count_dropped(manifest, 'evaluation text'):,}",
        }
    )


def _flow(page: Report, name: str, steps: Mapping[str, Mapping[str, int]], parts: Sequence[_Part]) -> None:
    """What each step did to the documents of one source, and what was taken of what it left."""
    page.subsection(f"Source: {name}")
    read = steps.get("read", {}).get("documents", 0)
    left, size, rows = read, 0, []
    for step, sums in steps.items():
        dropped = 0
        if step == "normalised":
            dropped, left, size = left - sums["documents"], sums["documents"], sums["bytes"]
        elif step in STATES:
            left, size = sums["documents"], sums["bytes"]
        else:
            dropped = sums["documents"]
            left, size = left - dropped, size - sums["bytes"]
        title = STATES.get(step) or DROPS.get(step, step)
        shown = "" if step in STATES else f"{dropped:,}"
        rows.append([title, shown, f"{left:,}", f"{left / max(1, read):.2%}", f"{size / 1e6:,.2f}"])
    page.bar_chart("Documents left", _funnel(steps, parts))
    page.table(["step", "dropped", "documents left", "share", "MB left"], rows)
    _taken(page, steps, parts)


def _funnel(steps: Mapping[str, Mapping[str, int]], parts: Sequence[_Part]) -> list[tuple[str, float, str]]:
    counts = {title: steps[step]["documents"] for step, title in STATES.items() if step in steps}
    counts["taken"] = sum(part.total("documents") for part in parts)
    return [(title, count, f"{count:,}") for title, count in counts.items()]


def _taken(page: Report, steps: Mapping[str, Mapping[str, int]], parts: Sequence[_Part]) -> None:
    rows = []
    for part in parts:
        documents, tokens, size = (part.total(count) for count in ("documents", "tokens", "bytes"))
        rows.append(_counted(part.split, documents, tokens, size, len(part.shards)))
    left = steps.get("left", {"documents": 0, "bytes": 0})
    over = left["documents"] - sum(part.total("documents") for part in parts)
    if over > 0:
        size = left["bytes"] - sum(part.total("bytes") for part in parts)
        rows.append(["beyond the budget", f"{over:,}", f"{size / 1e6:,.2f}", "", "", ""])
    page.table(["taken for", "documents", "MB", "tokens", "bytes per token", "shards"], rows)


def _counted(name: str, documents: int, tokens: int, size: int, shards: int) -> list[str]:
    ratio = f"{size / max(1, tokens):.3f}"
    return [name, f"{documents:,}", f"{size / 1e6:,.2f}", f"{tokens:,}", ratio, f"{shards:,}"]


def _labels(page: Report, manifest: Manifest) -> None:
    """Counts by the label that readers give: the kind of file, modules and topics of "stdlib"."""
    page.subsection("Taken, by kind of input")
    rows = [
        [name, *(f"{sums[count]:,}" for count in ("documents", "tokens", "bytes"))]
        for name, sums in manifest.sources.items()
    ]
    page.table(["input", "documents", "tokens", "bytes"], rows)


def _lengths(page: Report, shards: Mapping[_Part, Shard]) -> None:
    page.section("Document lengths")
    page.text(f"Tokens per document of the training split. {FIRST_SHARDS}")
    lengths = {part.source: np.diff(shard.starts) for part, shard in shards.items()}
    top = max(int(values.max()) for values in lengths.values()).bit_length()
    edges = [0] + [2**power for power in range(4, max(top, 4) + 1)]
    counts = {name: np.histogram(values, edges)[0] for name, values in lengths.items()}
    page.line_chart(
        "Documents by length",
        {
            name: [(float(edge), 100.0 * n / found.sum()) for edge, n in zip(edges[1:], found)]
            for name, found in counts.items()
        },
        x_label="tokens, up to",
        y_label="% of the documents",
        log_x=True,
    )
    rows = [
        [f"{low:,} to {high - 1:,}", *(f"{found[i]:,}" for found in counts.values())]
        for i, (low, high) in enumerate(pairwise(edges))
    ]
    page.table(["tokens", *counts], rows)


def _packing(page: Report, shards: Mapping[_Part, Shard], config: DataConfig) -> None:
    page.section(f"Packed in rows of {config.sequence_length:,} tokens")
    page.text(f'This recipe takes "{config.packing}". {FIRST_SHARDS}')
    rows = []
    for part, shard in shards.items():
        for packing in PACKINGS:
            count, positions, cut = _packed(shard, packing, config.sequence_length)
            used = positions / max(1, count * config.sequence_length)
            rows.append([part.name, packing, f"{count:,}", f"{used:.2%}", f"{cut / shard.documents:.1%}"])
    page.table(["split", "packing", "rows", "positions that predict", "documents cut"], rows)


def _packed(shard: Shard, packing: Packing, width: int) -> tuple[int, int, int]:
    """Rows, positions that predict, and documents in more than one row; nothing aligned."""
    starts = shard.starts
    if packing == "concat":  # the rows of `StreamRows`
        # A document's tokens but its last are positions; one of fewer than two tokens has none.
        last = np.maximum(starts[:-1], starts[1:] - 2)
        cut = starts[:-1] // width != last // width
        return num_rows(len(shard.tokens), width), len(shard.tokens) - shard.documents, int(cut.sum())
    table = pack(starts, packing=packing, sequence_length=width, align=1)
    return table.num_rows, int(table.positions.sum()), table.cut


def _samples(page: Report, shards: Mapping[_Part, Shard], tokenizer: Tokenizer) -> None:
    page.section("Sample documents")
    for part, shard in shards.items():
        texts = {}
        for index in sorted({int(i) for i in np.linspace(0, shard.documents - 1, SAMPLES)}):
            tokens = shard.document(index)
            text = tokenizer.decode(tokens[:SAMPLE_CHARACTERS].tolist())
            texts[f"document {index:,} ({len(tokens):,} tokens)"] = beginning(
                text, lines=SAMPLE_LINES, characters=SAMPLE_CHARACTERS
            )
        page.subsection(part.name)
        page.beside(texts)


def _tokenizer(page: Report, manifest: Manifest, tokenizer: Tokenizer) -> None:
    page.section("Tokenizer")
    known = manifest.tokenizer
    trained = f"SentencePiece {known['model_type']}, on {known['sample_bytes'] / 1e6:,.0f} MB of this at most"
    given = "tokenizer.json" if tokenizer.model.lstrip().startswith(b"{") else "SentencePiece"
    page.facts(
        {
            "kind": trained if known["path"] is None else f"{given}, given: {known['path']}",
            "vocabulary": f"{tokenizer.vocab_size:,}",
            "gives text back exactly": "yes"
            if tokenizer.lossless
            else "no: decoding is not what was encoded",
            "ids of BOS and EOS": f"{tokenizer.bos_id}, {tokenizer.eos_id}",
            "sha256": tokenizer.sha256[:16],
        }
    )


def _sources(page: Report, manifest: Manifest, config: DataConfig) -> None:
    page.section("Sources")
    found = manifest.source.get("sources") or dict.fromkeys(config.sources, manifest.source)
    rows = []
    for name, source in config.sources.items():
        what, licence = _what(found[name]), str(found[name]["licence"])
        weight = "its rows" if source.weight is None else f"{source.weight:g}"
        rows.append([name, what, licence, _budget(source.max_documents, source.max_tokens), weight])
    page.table(["source", "what it is", "licence", "budget", "weight in training"], rows)


def _what(described: Mapping[str, Any]) -> str:
    """A source in words, from what `describe` says of it."""
    if described["kind"] == "stdlib":
        return f"the library of Python {described['python']}"
    if described["kind"] == "path":
        return str(described["path"])
    subset = f":{described['subset']}" if described["subset"] else ""
    return f"{described['name']}{subset}@{described['revision']}, split {described['split']}"


def _budget(documents: int | None, tokens: int | None) -> str:
    limits = [f"{limit:,} {what}" for limit, what in ((documents, "documents"), (tokens, "tokens")) if limit]
    return " or ".join(limits) or "all of it"


def _seconds(page: Report, manifest: Manifest) -> None:
    page.section("Seconds")
    page.text("Of the run that finished the data set; what an earlier run had committed cost it nothing.")
    bars = [(stage, seconds, f"{seconds:,.1f} s") for stage, seconds in manifest.seconds.items()]
    page.bar_chart("Seconds per stage", bars)
