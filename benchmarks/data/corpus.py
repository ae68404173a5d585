"""Input of any size from a few real books: copies with their words in another order, no two alike."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

__all__ = ["book_words", "write_copies", "write_synthetic_documents"]

BODY = re.compile(
    r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*\n(.*)\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG",
    re.DOTALL,
)
# Words of a paragraph, and characters of a file's line in which a reader finds its way.
PARAGRAPH = 90


def book_words(folder: Path) -> list[np.ndarray]:
    """The words of each book (object array), licence left out. Raises ValueError: no books there."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ValueError(f"{folder} has no .txt books: give a folder of Project Gutenberg texts with --books")
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    found = ((BODY.search(text) or re.search("(.*)", text, re.DOTALL), text) for text in texts)
    return [np.array(match.group(1).split() if match else text.split(), object) for match, text in found]


def write_copies(folder: Path, books: list[np.ndarray], size: int) -> int:
    """Write at least `size` bytes of text to `folder`, a file per copy of a book; the bytes written.

    Words are permuted per copy; the first copy keeps their order. Files that are there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = copy = 0
    while written < size:
        for number, words in enumerate(books):
            path = folder / f"{copy:04d}-{number:02d}.txt"
            if not path.is_file():
                draw = np.random.default_rng([copy, number])
                path.write_text(_paragraphs(draw.permutation(words) if copy else words), encoding="utf-8")
            written += path.stat().st_size
        copy += 1
    return written


def _paragraphs(words: np.ndarray) -> str:
    parts = (words[start : start + PARAGRAPH] for start in range(0, len(words), PARAGRAPH))
    return "\n\n".join(" ".join(part) for part in parts) + "\n"


def write_synthetic_documents(
    folder: Path, documents: int, *, words: int, exact: float, near: float, seed: int = 0
) -> dict[str, int]:
    """JSON lines of short made-up documents, a share of which are copies of earlier ones.

    Args:
        folder: gets a file per 100,000 documents.
        documents: how many in all.
        words: of each, drawn evenly from 50,000 made-up ones.
        exact, near: shares that repeat an earlier document, or repeat it with one word in eighty replaced.

    Returns:
        How many of each kind: "exact", "near".
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    lexicon = np.array([f"{value:x}" for value in draw.integers(16**3, 16**6, 50_000)], object)
    counts, block = {"exact": 0, "near": 0}, 100_000
    for start in range(0, documents, block):
        chosen = draw.integers(0, len(lexicon), (min(block, documents - start), words))
        kind = draw.random(len(chosen))
        sources = (draw.random(len(chosen)) * np.arange(len(chosen))).astype(int)
        originals = (kind >= exact + near).nonzero()[0]
        copies = np.searchsorted(originals, sources, side="right") - 1
        copied = (kind < exact + near) & (copies >= 0)
        for row in copied.nonzero()[0]:
            chosen[row] = chosen[originals[copies[row]]]
            if kind[row] >= exact:
                span = max(1, words // 80)
                place = draw.integers(0, words - span)
                chosen[row, place : place + span] = draw.integers(0, len(lexicon), span)
        counts["exact"] += int((copied & (kind < exact)).sum())
        counts["near"] += int((copied & (kind >= exact)).sum())
        with open(folder / f"{start // block:04d}.jsonl", "w", encoding="ascii") as file:
            file.writelines('{"text": "' + " ".join(row) + '"}\n' for row in lexicon[chosen])
    return counts
