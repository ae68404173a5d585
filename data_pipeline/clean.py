"""Stage "clean": read, normalise, filter, and fingerprint the documents of one work unit.

    inputs -> documents -> normalised -> filters -> text.zst, documents, exact, bands, signatures

What needs only the document itself happens here, in one pass over the text; what needs all documents
(duplicates, splits, budgets) is decided afterwards from the small files, and no text is read for it again.

A committed unit holds, for the n documents that passed the filters, in order:

    text.zst              their normalised UTF-8 text, end to end
    documents             DOCUMENT[n]: hash of the text, bytes, label, and whether evaluation text was found
    exact                 EXACT[n], sorted: hash and position, for exact duplicates
    bands                 BAND[n * bands], sorted: key and position, for near duplicates
    signatures            uint32 [n, permutations]: MinHash values, to compare candidates by
    quarantine.jsonl      records that are no documents: file, offset, reason
    contamination.jsonl   documents that hold evaluation text: file, offset, n-gram, where it comes from
    dropped.jsonl         the first few documents that each filter dropped, for the report
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline import decontaminate, filters, language, normalize, signatures
from data_pipeline.commit import check_key, commit_unit, versions
from data_pipeline.config import DedupConfig, FilterConfig, NormalizeConfig, SourceConfig
from data_pipeline.content import check_unchanged
from data_pipeline.decontaminate import EvaluationNgrams
from data_pipeline.filters import Filters
from data_pipeline.readers import Document, Quarantined, read_item
from data_pipeline.sources import Unit
from trellis_dist.files import digest

__all__ = [
    "BAND",
    "CONTAMINATION",
    "DOCUMENT",
    "DROPPED",
    "EXACT",
    "QUARANTINE",
    "CleanStage",
    "clean_unit",
    "read_documents",
    "read_texts",
]

TEXT, DOCUMENTS = "text.zst", "documents"
QUARANTINE, CONTAMINATION, DROPPED = "quarantine.jsonl", "contamination.jsonl", "dropped.jsonl"
DOCUMENT = np.dtype([("hash", "<u8"), ("hash2", "<u8"), ("bytes", "<u8"), ("label", "<u4"), ("dirty", "<u4")])
EXACT = np.dtype([("hash", "<u8"), ("hash2", "<u8"), ("position", "<u4")])
BAND = np.dtype([("key", "<u8"), ("position", "<u4")])
# Documents whose MinHash values are computed together.
BATCH, BATCH_BYTES = 256, 8 * 2**20
# Dropped documents kept per filter, and characters of each.
EXAMPLES, EXAMPLE_CHARACTERS = 2, 400
READ_BLOCK = 1 << 20
# Raise when the code below changes what a unit contains.
VERSION = 1


@dataclass(frozen=True)
class CleanStage:
    """What decides a unit's output besides its inputs.

    Attributes:
        source: how records are read.
        normalize, filters: what is changed, and what is dropped.
        dedup: how documents are fingerprinted.
        ngrams: the file of evaluation n-grams (`EvaluationNgrams.save`), None without.
        ngrams_sha256: identity of it.
    """

    source: SourceConfig
    normalize: NormalizeConfig
    filters: FilterConfig
    dedup: DedupConfig
    ngrams: str | None = None
    ngrams_sha256: str | None = None

    def key(self, unit: Unit) -> str:
        """The unit's content address."""
        source = self.source
        read = [source.text_column, source.max_document_bytes]
        read += [source.text_document_bytes, source.strip_gutenberg]
        rules = [asdict(self.normalize), asdict(self.filters), self._fingerprints(), self.ngrams_sha256]
        rules += [language.language_version()] if self.filters.languages else []
        own = [VERSION, normalize.VERSION, filters.VERSION, decontaminate.VERSION]
        packages = versions("ftfy") if self.normalize.mojibake else versions()
        return digest([own, packages, unit.inputs, read, rules])

    def _fingerprints(self) -> list[Any]:
        if self.dedup.similarity is None:
            return []
        own = [self.dedup.shingle_words, self.dedup.permutations, self.dedup.bands]
        return [signatures.signature_version(), *own]


def clean_unit(unit: Unit, stage: CleanStage, key: str, work: str) -> dict[str, Any]:
    """Make and commit one unit, unless it is committed already.

    Args:
        unit: its inputs, sealed.
        stage: what to do with them.
        key: its content address, as the driver has it.
        work: the data set's work folder, shared by all workers.

    Returns:
        unit.json: ``labels``, and ``counts``: per label, per step ("read", "filter: RULE", "kept"),
        ``[documents, bytes]``; ``quarantined``, ``contaminated``.

    Raises:
        OSError: an input changed or vanished, or the disk is full; nothing is committed then.
        RuntimeError: this node is not like the driver's.
    """
    check_key(stage.key(unit), key)

    def write(folder: Path) -> dict[str, Any]:
        with ExitStack() as stack:
            pass_ = _Pass(stage, folder, stack)
            for item in unit.items:
                for found in read_item(item, stage.source):
                    pass_.take(found)
            pass_.sign()
        summary = pass_.finish()
        check_unchanged(unit.items)
        return summary

    return commit_unit(work, "clean", key, write)


@dataclass
class _Pass:
    """One pass over a unit's records: counts, and the files as far as they are written."""

    stage: CleanStage
    folder: Path
    stack: ExitStack
    labels: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    documents: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    quarantined: int = 0
    contaminated: int = 0

    def __post_init__(self) -> None:
        import zstandard

        names = (QUARANTINE, CONTAMINATION, DROPPED, "bands.raw", "signatures")
        near = self.stage.dedup.similarity is not None
        self.files = {name: self._open(name) for name in names[: 5 if near else 3]}
        compressor = zstandard.ZstdCompressor(level=1)
        self.text = self.stack.enter_context(compressor.stream_writer(self._open(TEXT)))
        self.filters = Filters(self.stage.filters)
        self.ngrams = None
        if self.stage.ngrams is not None:
            self.ngrams = _ngrams(self.stage.ngrams, str(self.stage.ngrams_sha256))

    def _open(self, name: str) -> IO[bytes]:
        return self.stack.enter_context(open(self.folder / name, "xb"))

    def take(self, found: Document | Quarantined) -> None:
        if isinstance(found, Quarantined):
            self.quarantined += 1
            self._log(QUARANTINE, asdict(found))
            return
        text = normalize.normalize(found.text, self.stage.normalize)
        data = text.encode()
        self._count(found.source, "read", len(found.text.encode()))
        if not text.strip():
            self.quarantined += 1
            self._log(QUARANTINE, asdict(Quarantined(found.file, found.offset, "no text once normalised")))
            return
        self._count(found.source, "normalised", len(data))
        if (rule := self.filters.reject(text)) is not None:
            self._count(found.source, f"filter: {rule}", len(data))
            self._example(rule, found, text)
            return
        self._count(found.source, "kept", len(data))
        self._keep(found, text, data)

    def _keep(self, found: Document, text: str, data: bytes) -> None:
        dirty = self._contamination(found, text)
        label = self.labels.setdefault(found.source, len(self.labels))
        hashed = hashlib.sha256(data).digest()
        words = (int.from_bytes(hashed[:8]), int.from_bytes(hashed[8:16]))
        self.documents.append((*words, len(data), label, dirty))
        self.text.write(data)
        if "signatures" in self.files:
            self.texts.append(text)
            self.waiting += len(data)
            if len(self.texts) == BATCH or self.waiting > BATCH_BYTES:
                self.sign()

    def _contamination(self, found: Document, text: str) -> bool:
        match = self.ngrams.find(text) if self.ngrams is not None else None
        if match is None:
            return False
        self.contaminated += 1
        record = {"position": len(self.documents), "file": found.file, "offset": found.offset}
        self._log(CONTAMINATION, record | {"ngram": match.ngram, "evaluation": match.source})
        return True

    def sign(self) -> None:
        """Fingerprint the texts that wait for it."""
        if not self.texts:
            return
        found = signatures.signatures(self.texts, self.stage.dedup)
        self.files["signatures"].write(np.ascontiguousarray(found, "<u4").tobytes())
        self.files["bands.raw"].write(signatures.band_keys(found, self.stage.dedup.bands).tobytes())
        self.texts.clear()
        self.waiting = 0

    def _count(self, label: str, step: str, size: int) -> None:
        sums = self.counts.setdefault(label, {}).setdefault(step, [0, 0])
        sums[0] += 1
        sums[1] += size

    def _example(self, rule: str, found: Document, text: str) -> None:
        if self.examples.setdefault(rule, 0) < EXAMPLES:
            self.examples[rule] += 1
            record = {"rule": rule, "file": found.file, "offset": found.offset, "bytes": len(text.encode())}
            self._log(DROPPED, record | {"text": text[:EXAMPLE_CHARACTERS]})

    def _log(self, name: str, record: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(record, sort_keys=True).encode() + b"\n")

    def finish(self) -> dict[str, Any]:
        """Write what is sorted, once the stack is closed, and return the summary."""
        documents = np.array(self.documents, DOCUMENT)
        documents.tofile(self.folder / DOCUMENTS)
        exact = np.empty(len(documents), EXACT)
        exact["hash"], exact["hash2"] = documents["hash"], documents["hash2"]
        exact["position"] = np.arange(len(documents))
        exact[np.lexsort((exact["hash2"], exact["hash"]))].tofile(self.folder / "exact")
        if "signatures" in self.files:
            self._sort_bands()
        return {
            "labels": list(self.labels),
            "counts": self.counts,
            "quarantined": self.quarantined,
            "contaminated": self.contaminated,
            "documents": len(documents),
            "bytes": int(documents["bytes"].sum()),
        }

    def _sort_bands(self) -> None:
        raw = self.folder / "bands.raw"
        keys = np.fromfile(raw, "<u8")
        raw.unlink()
        bands = np.empty(len(keys), BAND)
        bands["key"], bands["position"] = keys, np.arange(len(keys)) // self.stage.dedup.bands
        bands[np.argsort(keys, kind="stable")].tofile(self.folder / "bands")


@lru_cache(maxsize=1)
def _ngrams(path: str, sha256: str) -> EvaluationNgrams:
    """The n-grams, read once per worker."""
    found = EvaluationNgrams.load(Path(path))
    assert found.sha256 == sha256, f"{path} changed while the job ran"
    return found


def read_documents(folder: Path) -> np.ndarray:
    """DOCUMENT [n]: the records of a committed unit."""
    return np.fromfile(folder / DOCUMENTS, DOCUMENT)


def read_texts(folder: Path, wanted: np.ndarray | None = None) -> Iterator[str]:
    """Normalised texts of a committed unit, in order, one in memory at a time.

    Args:
        folder: the unit.
        wanted: bool [n], which documents; None gives all.
    """
    import zstandard

    sizes = read_documents(folder)["bytes"]
    chosen = np.ones(len(sizes), bool) if wanted is None else wanted
    last = int(np.flatnonzero(chosen)[-1]) + 1 if chosen.any() else 0
    with open(folder / TEXT, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for size, take in zip(sizes[:last].tolist(), chosen[:last].tolist()):
            data = _exactly(stream, size)
            if take:
                yield data.decode()


def _exactly(stream: Any, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = stream.read(min(size, READ_BLOCK))
        assert part, "text.zst is shorter than its documents, though its hash is right"
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
