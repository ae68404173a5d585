"""Small texts, settings and comparisons that the room's tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.readers import Document, Quarantined, read_item
from data_pipeline.sources import Unit

WORDS = [f"w{n:x}" + "aeiou"[n % 5] * (n % 4) for n in range(400)]
MARKUP = "<script>alert('from the corpus')</script>\n"
# What a data set holds beside its files: a lock, times (the report shows them), where it was made from.
NOT_COMPARED = (".lock", "timings.json", "config.json", "report.html")


def prose(seed: int, words: int = 300) -> str:
    """Text with lines, indents, tabs and a little Unicode, the same for the same seed."""
    draw = random.Random(seed)
    gaps = [" ", " ", " ", "\n", "\n    ", "\t", ", ", " \u00e9\u4e2d "]
    parts = [draw.choice(WORDS) + draw.choice(gaps) for _ in range(words)]
    return "".join(parts) + f"end {seed}\n"


def rows(seeds: range) -> list[str]:
    """JSON lines."""
    return [json.dumps({"text": prose(seed), "n": seed}) + "\n" for seed in seeds]


def settings(directory: Path, corpus: Path, **changes: object) -> DataConfig:
    """A small config: 400 pieces, units of 8 kB."""
    fields: dict = {
        "sequence_length": 64,
        "unit_bytes": 8192,
        "validation_fraction": 0.1,
        "tokenizer": TokenizerConfig(vocab_size=400, threads=1),
    }
    if "mixture" not in changes:
        fields["source"] = SourceConfig(kind="path", path=str(corpus))
    return DataConfig(directory=str(directory), **(fields | changes))


def unit_documents(unit: Unit, source: SourceConfig) -> Iterator[Document | Quarantined]:
    """What a unit's inputs hold, in order."""
    for item in unit.items:
        yield from read_item(item, source)


def hashes(directory: Path) -> dict[str, bytes]:
    """Every file a run makes that must not depend on how it ran."""
    paths = [path for path in directory.iterdir() if path.is_file()]
    paths += (directory / "index").glob("*")
    return {p.name: p.read_bytes() for p in sorted(paths) if p.name not in NOT_COMPARED}
