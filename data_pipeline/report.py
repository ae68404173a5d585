"""The data set's page: counts, lengths, packing, what was quarantined, and a look at the text itself."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest, SplitInfo
from data_pipeline.pack import Stream, num_rows
from data_pipeline.shard import Shard
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import atomic_write
from trellis_dist.report import Report

__all__ = ["write_report"]

SAMPLES, SAMPLE_CHARACTERS, QUARANTINE_ROWS = 3, 600, 50


def write_report(directory: Path, manifest: Manifest, config: DataConfig) -> Path:
    """Write ``directory``/report.html, one self-contained page; all text of the corpus is escaped.

    Args:
        directory: the data set, its shards, tokenizer and quarantine.jsonl written.
        manifest: its manifest.
        config: its config; the packing figures are for ``config.sequence_length``.
    """
    streams = {
        name: Stream([Shard(directory / shard.name) for shard in split.shards])
        for name, split in manifest.splits.items()
    }
    page = Report("Data set", f"{manifest.source['kind']} corpus, fingerprint {manifest.fingerprint[:16]}")
    _facts(page, manifest)
    _counts(page, manifest)
    _lengths(page, streams)
    _packing(page, streams, config.sequence_length)
    _quarantined(page, manifest.quarantined, directory / "quarantine.jsonl")
    _samples(page, streams, Tokenizer.load(directory / "tokenizer.model"))
    path = directory / "report.html"
    atomic_write(path, page.render())
    return path


def _facts(page: Report, manifest: Manifest) -> None:
    splits = manifest.splits.values()
    size, tokens = sum(s.bytes for s in splits), sum(s.tokens for s in splits)
    page.facts(
        {
            "documents": f"{sum(s.documents for s in splits):,}",
            "text": f"{size / 1e6:.2f} MB",
            "tokens": f"{tokens:,}",
            "bytes per token": f"{size / tokens:.3f}",
            "vocabulary": f"{manifest.tokenizer['vocab_size']:,} ({manifest.tokenizer['model_type']})",
            "quarantined": f"{manifest.quarantined:,}",
        }
    )
    page.section("Source")
    page.table(["what", "value"], [[key, str(value)] for key, value in manifest.source.items()])


def _counts(page: Report, manifest: Manifest) -> None:
    page.section("Documents and tokens")
    rows = [_row(name, split) for name, split in manifest.splits.items()]
    page.table(["split", "documents", "tokens", "bytes", "bytes per token", "shards"], rows)
    labels = [
        [name, f"{sums['documents']:,}", f"{sums['tokens']:,}", f"{sums['bytes']:,}"]
        for name, sums in manifest.sources.items()
    ]
    page.table(["source", "documents", "tokens", "bytes"], labels)


def _row(name: str, split: SplitInfo) -> list[str]:
    ratio = f"{split.bytes / split.tokens:.3f}"
    counts = [f"{value:,}" for value in (split.documents, split.tokens, split.bytes)]
    return [name, *counts, ratio, str(len(split.shards))]


def _lengths(page: Report, streams: dict[str, Stream]) -> None:
    page.section("Document lengths")
    lengths = {name: np.diff(stream.document_starts) for name, stream in streams.items()}
    top = max(int(values.max()) for values in lengths.values()).bit_length()
    edges = [0] + [2**power for power in range(4, max(top, 4) + 1)]
    counts = {name: np.histogram(values, edges)[0] for name, values in lengths.items()}
    page.line_chart(
        "Documents by length",
        {
            name: [(float(edge), float(n)) for edge, n in zip(edges[1:], found)]
            for name, found in counts.items()
        },
        x_label="tokens, up to",
        y_label="documents",
        log_x=True,
    )
    rows = [
        [f"{low:,} to {high - 1:,}", *(f"{counts[name][i]:,}" for name in streams)]
        for i, (low, high) in enumerate(pairwise(edges))
    ]
    page.table(["tokens", *streams], rows)


def _packing(page: Report, streams: dict[str, Stream], width: int) -> None:
    page.section(f"Packed end to end, in rows of {width:,} tokens")
    rows = []
    for name, stream in streams.items():
        documents = len(stream.document_starts) - 1
        samples = num_rows(len(stream), width)
        first, last = stream.document_starts[:-1] // width, (stream.document_starts[1:] - 1) // width
        used = (len(stream) - documents) / max(1, samples * width)
        rows.append([name, f"{samples:,}", f"{used:.2%}", f"{(first != last).mean():.1%}"])
    page.table(["split", "rows", "positions that predict", "documents cut"], rows)


def _quarantined(page: Report, count: int, path: Path) -> None:
    page.section("Quarantined")
    if not count:
        page.text("Nothing was left out.")
        return
    page.text(f"{count:,} records were left out; {path.name} lists all of them.")
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in islice(file, QUARANTINE_ROWS)]
    rows = [[record["file"], f"{record['offset']:,}", record["reason"]] for record in records]
    page.table(["file", "offset", "reason"], rows)


def _samples(page: Report, streams: dict[str, Stream], tokenizer: Tokenizer) -> None:
    page.section("Sample documents")
    for name, stream in streams.items():
        documents = len(stream.document_starts) - 1
        for index in sorted({int(i) for i in np.linspace(0, documents - 1, min(SAMPLES, documents))}):
            start, stop = (int(i) for i in stream.document_starts[index : index + 2])
            text = tokenizer.decode(stream.slice(start, min(stop, start + SAMPLE_CHARACTERS)).tolist())
            page.text(f"{name}, document {index:,} ({stop - start:,} tokens)")
            page.preformatted(text[:SAMPLE_CHARACTERS])
