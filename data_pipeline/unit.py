"""One work unit: read, normalise, split, tokenise, commit; a pure function of inputs and config.

A committed unit is a folder ``work/units/KEY``: train.tokens and validation.tokens (the documents' tokens end
to end), documents (a record of each, in order), quarantine.jsonl, and unit.json with the sums and the hash of
each file. KEY is the hash of all that decides the content, so a unit made by any worker, in any run, at any
time, is the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline import normalize
from data_pipeline.config import SourceConfig
from data_pipeline.content import check_unchanged
from data_pipeline.holdout import document_hash
from data_pipeline.readers import Document, Quarantined
from data_pipeline.shard import token_dtype
from data_pipeline.sources import Unit, unit_documents
from data_pipeline.tokenizer import Tokenizer
from trellis_dist.files import REAL, commit_directory, digest, read_json, sha256_file, write_json

__all__ = [
    "LABEL",
    "QUARANTINE",
    "SIZE",
    "SPLIT",
    "SPLITS",
    "TOKENS",
    "VERSION",
    "Stage",
    "process_unit",
    "read_records",
    "read_unit",
    "sample_texts",
]

SPLITS = ("train", "validation")
DOCUMENTS, QUARANTINE = "documents", "quarantine.jsonl"
FILES = ("train.tokens", "validation.tokens", DOCUMENTS, QUARANTINE)
# Columns of the int64 record of a document: index in SPLITS, index in unit.json's labels, tokens, bytes.
SPLIT, LABEL, TOKENS, SIZE = range(4)
RECORD = np.dtype("<i8")
# Raise when the code below changes what a unit contains.
VERSION = 2


@dataclass(frozen=True)
class Stage:
    """What decides a unit's output besides its inputs.

    Attributes:
        source: how records are read.
        held_out_below: a document whose hash (64 bit) is below this goes to the validation split.
        tokenizer_sha256: identity of the tokenizer.
    """

    source: SourceConfig
    held_out_below: int
    tokenizer_sha256: str

    def key(self, unit: Unit) -> str:
        """The unit's content address."""
        read = (self.source.text_column, self.source.max_documents, self.source.max_document_bytes)
        rules = [VERSION, normalize.VERSION, *read, self.source.text_document_bytes]
        return digest([unit.inputs, rules, str(self.held_out_below), self.tokenizer_sha256])


def process_unit(unit: Unit, stage: Stage, tokenizer_path: str, work: str) -> dict[str, Any]:
    """Make and commit one unit, unless it is committed already.

    Args:
        unit: the inputs.
        stage: what to do with them.
        tokenizer_path: .model file, whose hash is ``stage.tokenizer_sha256``.
        work: the data set's work folder, shared by all workers.

    Returns:
        The content of unit.json.

    Raises:
        OSError: an input changed or vanished, or the disk is full; nothing is committed then.
    """
    final = Path(work, "units", stage.key(unit))
    attempt = Path(work, "attempts", f"{final.name}-{os.getpid()}-{os.urandom(4).hex()}")
    tokenizer = Tokenizer.load(tokenizer_path)
    assert tokenizer.sha256 == stage.tokenizer_sha256, f"{tokenizer_path} changed while the job ran"
    attempt.mkdir(parents=True)
    try:
        entry = _write_files(attempt, unit, stage, tokenizer)
        check_unchanged(unit.items)
        write_json(attempt / "unit.json", entry)
        commit_directory(attempt, final)
    except FileExistsError:  # another worker was given the same unit and was faster: the content is the same
        REAL.remove_tree(attempt)
    except BaseException:
        REAL.remove_tree(attempt)
        raise
    return read_json(final / "unit.json")  # type: ignore[no-any-return]


def _write_files(attempt: Path, unit: Unit, stage: Stage, tokenizer: Tokenizer) -> dict[str, Any]:
    labels: dict[str, int] = {}
    sums = dict.fromkeys(("documents", "tokens", "bytes", "quarantined"), 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(attempt / name, "xb")) for name in FILES}
        for found in unit_documents(unit, stage.source):
            if isinstance(found, Quarantined):
                sums["quarantined"] += 1
                files[QUARANTINE].write(json.dumps(asdict(found), sort_keys=True).encode() + b"\n")
                continue
            split = int(document_hash(found.text) < stage.held_out_below)
            tokens = _write_tokens(files[f"{SPLITS[split]}.tokens"], found.text, tokenizer)
            size = len(found.text.encode())
            record = [split, labels.setdefault(found.source, len(labels)), tokens, size]
            files[DOCUMENTS].write(np.array(record, dtype=RECORD).tobytes())
            for key, value in (("documents", 1), ("tokens", tokens), ("bytes", size)):
                sums[key] += value
    return sums | {"labels": list(labels), "sha256": _hashes(attempt)}


def _write_tokens(file: IO[bytes], text: str, tokenizer: Tokenizer) -> int:
    """Append [BOS] pieces [EOS]; returns how many."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    file.write(np.array(ids, dtype=token_dtype(tokenizer.vocab_size)).tobytes())
    return len(ids)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name) for name in FILES}


def read_unit(folder: Path) -> dict[str, Any] | None:
    """unit.json of a committed unit whose files match their hashes; otherwise None, the folder removed.

    It holds sums (documents, tokens, bytes, quarantined), the labels of the sources, and the hashes.
    """
    if not folder.is_dir():
        return None
    try:
        entry = read_json(folder / "unit.json")
        if _hashes(folder) == entry["sha256"]:
            return entry  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    REAL.remove_tree(folder)
    return None


def read_records(folder: Path) -> np.ndarray:
    """Records of a committed unit's documents: int64 [documents, 4], columns SPLIT, LABEL, TOKENS, SIZE."""
    return np.fromfile(folder / DOCUMENTS, dtype=RECORD).reshape(-1, 4)


def sample_texts(units: Iterable[Unit], source: SourceConfig, below: int, budget: int) -> Iterator[str]:
    """Documents that are not held out (hash `below` or more): about `budget` bytes from each unit's start."""
    for unit in units:
        left = budget
        for found in unit_documents(unit, source):
            if isinstance(found, Document) and document_hash(found.text) >= below:
                yield found.text
                left -= len(found.text.encode())
                if left <= 0:
                    break
