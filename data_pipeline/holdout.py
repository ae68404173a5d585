"""Which documents are held out: whole ones, by the hash of their text, so that equal texts stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data_pipeline.config import SourceConfig
from data_pipeline.readers import Document, Quarantined
from data_pipeline.sources import Unit, unit_documents

__all__ = ["document_hash", "held_out_below"]

# Up to this many input bytes, all documents are looked at first, so that even a corpus of a few files gets a
# held-out document. Beyond it there are hashes enough.
LOOK_THROUGH = 64 * 2**20


def document_hash(text: str) -> int:
    """64-bit hash of the normalised text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def held_out_below(units: Sequence[Unit], source: SourceConfig, fraction: float) -> int:
    """The threshold: a document whose hash is below it is held out.

    A share of about `fraction` of the documents; in a small corpus at least one, and never all.

    Raises:
        ValueError: a small corpus has no readable document, or only one.
    """
    below = int(fraction * 2**64)
    if not 0 < sum(unit.size for unit in units) <= LOOK_THROUGH:
        return below
    hashes: set[int] = set()
    left_out: Quarantined | None = None
    for found in (found for unit in units for found in unit_documents(unit, source)):
        if isinstance(found, Document):
            hashes.add(document_hash(found.text))
        else:
            left_out = left_out or found
    if not hashes:
        why = f" ({left_out.file} at {left_out.offset}: {left_out.reason})" if left_out else ""
        raise ValueError(f"data.source: no document of the corpus could be read{why}")
    if len(hashes) == 1:
        raise ValueError(
            "data.source: the corpus is one document, but whole documents are held out for validation: add "
            "documents, or cut a long .txt file with data.source.text_document_bytes = 65536"
        )
    return min(max(below, min(hashes) + 1), max(hashes))
