"""What the text of runs can show, from their shards: how often they see it, how much context it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.experiments.expand import Expansion
from launch.experiments.page import Block, Page, Section, Table, Text
from launch.experiments.spec import RunSpec

if TYPE_CHECKING:
    import numpy as np

__all__ = ["context_shares", "repeats", "with_notes"]

# Passes over a text from which on losses say more and more who learns it by heart.
EPOCHS = 2.0


def repeats(specs: Iterable[RunSpec]) -> list[str]:
    """A line for each text that runs see more than about twice; nothing of one that has no shards yet."""
    asked: dict[tuple[str, int], list[str]] = {}
    for spec in specs:
        recipe = spec.resolved
        asked.setdefault((recipe.data.directory, recipe.tokens()), []).append(spec.name)
    return [
        f"{len(names)} runs of {tokens:,} tokens on the {found:,} in {folder} see them {tokens / found:.1f} "
        f"times over: models are ranked by how they overfit too; --corpus takes a larger text"
        for (folder, tokens), names in asked.items()
        if (found := _train_tokens(folder)) and tokens > EPOCHS * found
    ]


def _train_tokens(folder: str) -> int | None:
    from data_pipeline.manifest import MANIFEST, load_manifest

    if not (Path(folder) / MANIFEST).is_file():
        return None
    return load_manifest(folder).splits["train"].tokens


def context_shares(folder: Path | str, lengths: Sequence[int]) -> dict[int, float]:
    """Per length, the share of training targets with at least as many tokens before them in their document.

    Of a document of L stored tokens the first (BOS) is no target, and target i of 1 to L - 1 has i before it.

    Raises:
        ValueError, OSError: the shards cannot be read.
    """
    documents = _document_lengths(Path(folder))
    targets = int((documents - 1).sum())
    return {n: int((documents - n).clip(min=0).sum()) / max(targets, 1) for n in lengths}


def _document_lengths(folder: Path) -> np.ndarray:
    """int64 [documents], stored tokens of each document of the training split that has any."""
    import numpy as np

    from data_pipeline.manifest import load_manifest
    from data_pipeline.shard import Shard

    shards = load_manifest(folder).splits["train"].shards
    lengths = np.concatenate([np.diff(Shard(folder / info.name).starts) for info in shards])
    return lengths[lengths > 0]


def with_notes(page: Page, expansion: Expansion) -> Page:
    """The page with what its texts can show, before its first heading."""
    notes: list[Block] = [Text(line) for line in repeats(expansion.specs.values())]
    notes += _context(expansion)
    blocks = list(page.blocks)
    place = next((i for i, block in enumerate(blocks) if isinstance(block, Section)), len(blocks))
    return replace(page, blocks=[*blocks[:place], *notes, *blocks[place:]])


def _context(expansion: Expansion) -> list[Block]:
    """Of an experiment that compares contexts: how many targets can use each of them."""
    runs = {
        run: (recipe.data.directory, recipe.data.sequence_length)
        for (_, run, _), spec in expansion.specs.items()
        for recipe in [spec.resolved]
    }
    if len({length for _, length in runs.values()}) < 2:
        return []
    shares = {folder: _shares(folder, runs) for folder, _ in runs.values()}
    rows = [
        [run, f"{length:,}", f"{100 * found[length]:.1f}%" if (found := shares[folder]) else "no shards here"]
        for run, (folder, length) in runs.items()
    ]
    title = "Training targets with at least as much context before them in their document"
    return [
        Text(
            "States begin anew at every document and every row: only a target with as many tokens before it "
            "in its document can use the whole of a context. What else differs between contexts is how "
            "documents are cut into rows."
        ),
        Table(title, ["run", "context", "share of targets"], rows),
    ]


def _shares(folder: str, runs: Mapping[str, tuple[str, int]]) -> dict[int, float]:
    """Empty where the shards are not here: a page is made of results that are."""
    lengths = sorted({length for place, length in runs.values() if place == folder})
    try:
        return context_shares(folder, lengths)
    except (OSError, ValueError):
        return {}
